"""Every row of the operator table is run: a claim that the operator does not keep is a failing test."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.ops import Kind
from graphopt.ops.table import FAMILIES
from tests.ops.calls import flat, full, named, node_of, overload, rerun, run, same, samples
from tests.ops.layer_samples import ALONG, ATTENTION, LAYERS, OTHERS, PRODUCTS, REDUCTIONS, WINDOWS
from tests.ops.samples import INDEXING, MOVEMENTS, POINTWISE, Call, t

# The schema


@pytest.mark.parametrize("name", ops.TABLE)
def test_row_names_what_the_schema_has(name: str) -> None:
    schema = overload(name)._schema
    info, names = ops.TABLE[name], {row.name for row in schema.arguments}
    assert not schema.is_mutable
    for claim in (info.training, info.probability):
        assert claim is None or claim in names
    for claim in _argument_names(info.axes):
        assert claim in names, f"{name} has no argument '{claim}'"


def _argument_names(axes: ops.Axes) -> list[str]:
    found: list[str] = []
    for field in ("operands", "per_channel", "values", "parameters"):
        value = getattr(axes, field, None) or ()
        found += [value] if isinstance(value, str) else value
    for field in (
        "input",
        "weight",
        "bias",
        "groups",
        "keepdim",
        "table",
        "indices",
        "added",
        "operand",
        "flag",
    ):
        found += [value] if (value := getattr(axes, field, None)) else []
    if getattr(axes, "dim", None) and getattr(axes, "axis", None) is None:
        found.append(axes.dim)  # type: ignore[attr-defined]
    return [] if isinstance(axes, ops.Reduced) and axes.dim is None else found


def test_no_operator_has_two_rows() -> None:
    assert sum(len(family.ROWS) for family in FAMILIES) == len(ops.TABLE) > 550


def test_every_row_is_sampled() -> None:
    tables = (ALONG, ATTENTION, INDEXING, LAYERS, MOVEMENTS, OTHERS, POINTWISE, PRODUCTS, REDUCTIONS, WINDOWS)
    sampled = {full(name) for table in tables for name in table}
    automatic = {n for n, i in ops.TABLE.items() if isinstance(i.axes, ops.Broadcast) or i.kind is Kind.MOVEMENT}
    untested = {n for n, i in ops.TABLE.items() if not isinstance(i.axes, ops.Created)}
    assert untested - sampled - automatic == set()
    assert sampled - set(ops.TABLE) == set()


# Element-wise operators

SHAPES = [(2, 1, 4), (3, 1), (2, 3, 4)]
KINDS = [lambda *shape: t(*shape), lambda *shape: (t(*shape) * 20).long(), lambda *shape: t(*shape) > 0.5]


def pointwise_calls(name: str) -> list[dict[str, Any]]:
    """Calls of an element-wise operator by its schema, with every dtype that it takes."""
    if name in POINTWISE:
        return [named(name, call) for call in POINTWISE[name]]
    found = []
    for make in KINDS:
        values: dict[str, Any] = {}
        shapes = iter(SHAPES)
        for row in overload(name)._schema.arguments:
            kind = str(row.type)
            if "Tensor" in kind:
                values[row.name] = make(*next(shapes))
            elif not row.has_default_value() or kind == "Optional[number]":
                values[row.name] = "floor" if "str" in kind else 2
        try:
            rerun(name, values)
        except (RuntimeError, NotImplementedError):
            continue
        found.append(values)
    assert found, f"no way found to call {name}"
    return found


@pytest.mark.parametrize("name", [n for n, i in ops.TABLE.items() if isinstance(i.axes, ops.Broadcast)])
def test_elementwise(name: str) -> None:
    axes = ops.TABLE[name].axes
    assert isinstance(axes, ops.Broadcast)
    for values in pointwise_calls(name):
        tensors = [key for key, value in values.items() if isinstance(value, Tensor)]
        operands = list(axes.operands or tensors)
        result = rerun(name, values)
        target = torch.broadcast_shapes(*(values[key].shape for key in operands))
        assert result.shape == target
        spread = values | {key: values[key].expand(target).clone() for key in operands if values[key].dim()}
        if axes.per_channel:
            _check_per_channel(name, values, axes.per_channel)
            continue
        order = torch.randperm(target.numel(), generator=torch.Generator().manual_seed(0))
        shuffled = {k: v.reshape(-1)[order] for k, v in spread.items() if k in operands and v.dim()}
        same(rerun(name, spread | shuffled), result.reshape(-1)[order])
        changed = {key: value.clone() for key, value in spread.items() if key in shuffled}
        for value in changed.values():
            value.reshape(-1)[0] = value.reshape(-1)[1]
        same(rerun(name, spread | changed).reshape(-1)[1:], result.reshape(-1)[1:])


def _check_per_channel(name: str, values: dict[str, Any], vectors: tuple[str, ...]) -> None:
    x = values["self"]
    order = torch.tensor([2, 0, 1])
    moved = {"self": x[:, order]} | {key: values[key][order] for key in vectors}
    same(rerun(name, values | moved), rerun(name, values)[:, order])
    order = torch.randperm(x.shape[2])
    same(rerun(name, values | {"self": x[:, :, order]}), rerun(name, values)[:, :, order])


@pytest.mark.parametrize("name", [n for n, i in ops.TABLE.items() if i.commutative])
def test_commutative(name: str) -> None:
    assert len(SHAPES) > 1
    for values in pointwise_calls(name):
        a, b = list(values)[:2]
        swapped = rerun(name, values | {a: values[b], b: values[a]})
        assert torch.equal(rerun(name, values), swapped)


# Movements


def relabel(x: Tensor) -> Tensor:
    """One to one on the samples' values, and fixed on the fill values 0 and 7."""
    return torch.where((x == 0) | (x == 7), x, 3 - x * x)


@pytest.mark.parametrize(("name", "call"), samples(MOVEMENTS, INDEXING))
def test_movement_commutes_with_relabelling(name: str, call: Call) -> None:
    info, values = ops.TABLE[name], named(name, call)
    axes = info.axes
    moved = axes.values if isinstance(axes, ops.Moved) else (axes.table, axes.values)  # type: ignore[attr-defined]
    if info.work:  # accumulates: not a movement, only claimed to be pure
        rerun(name, values)
        return
    changed = {key: pytree.tree_map_only(Tensor, relabel, values[key]) for key in moved if key in values}
    expected = [relabel(part) for part in flat(rerun(name, values))]
    same(rerun(name, values | changed), expected)


@pytest.mark.parametrize("name", [n for n, i in ops.TABLE.items() if i.kind is Kind.MOVEMENT])
def test_movement_without_options(name: str) -> None:
    if name.removesuffix(".default") in MOVEMENTS:
        return
    same(rerun(name, {"self": relabel(t(3, 4))}), relabel(rerun(name, {"self": t(3, 4)})))


@pytest.mark.parametrize("name", [n for n, i in ops.TABLE.items() if i.view and i.kind is Kind.MOVEMENT])
def test_a_view_shares_memory_or_is_not_called_one(name: str) -> None:
    calls = MOVEMENTS.get(name.removesuffix(".default"), [((t(3, 4),), {})])
    for call in calls:
        shares = all(
            part.untyped_storage().data_ptr() == flat(call)[0].untyped_storage().data_ptr()
            for part in flat(overload(name)(*call[0], **call[1]))
        )
        assert shares or not ops.is_view(node_of(name, call)), f"{name} copies"


# Constants

SPECIAL = {
    "scalar_tensor": ((2.0,), {}),
    "linspace": ((0, 1, 5), {}),
    "full_like": ((t(2, 3), 7.0), {}),
    "new_full": ((t(2), [2, 3], 7.0), {}),
    "tril_indices": ((3, 4), {}),
    "triu_indices": ((3, 4), {}),
}


@pytest.mark.parametrize("name", [n for n, i in ops.TABLE.items() if i.kind is Kind.CREATION])
def test_constants_do_not_depend_on_values(name: str) -> None:
    short = name.removesuffix(".default")
    empty = "empty" in name
    for scale in (1, 3):
        call = SPECIAL.get(short) or (tuple(_creation(name, scale)), {})
        first, second = run(name, call), run(name, SPECIAL.get(short) or (tuple(_creation(name, 5)), {}))
        assert first.shape == second.shape and (empty or torch.equal(first, second))


def _creation(name: str, scale: int) -> Any:
    for row in overload(name)._schema.arguments:
        if not row.has_default_value() and not row.kwarg_only:
            kind = str(row.type)
            yield (
                t(2, 3) * scale if "Tensor" in kind else [2, 3] if "List" in kind else "periodic" not in row.name and 4
            )


# Axes that stay apart


@pytest.mark.parametrize(("name", "call"), samples(LAYERS, WINDOWS, ALONG, REDUCTIONS))
def test_positions_stay_apart_along_unmixed_axes(name: str, call: Call) -> None:
    check_apart(name, call, ops.TABLE[name].axes)


def check_apart(name: str, call: Call, axes: ops.Axes) -> None:
    """Permuting positions along an unmixed axis permutes the output alike."""
    values = named(name, call)
    mixed = axes.mixed(node_of(name, call))
    assert mixed is not None
    main = next(iter(values))
    x, result = values[main], rerun(name, values)
    for axis in set(range(x.dim())) - set(mixed):
        order = torch.tensor(random.Random(axis).sample(range(x.shape[axis]), x.shape[axis]))
        moved = {main: x.index_select(axis, order)}
        if isinstance(axes, ops.Normalized) and axis == 1 and axes.over != "trailing":
            moved |= {key: values[key][order] for key in axes.parameters if values.get(key) is not None}
        vanished = 0
        if isinstance(axes, ops.Reduced) and not values.get("keepdim", False):
            vanished = sum(other < axis for other in mixed)
        expected = [part.index_select(axis - vanished, order) for part in flat(result)]
        same(rerun(name, values | moved), expected)
        nudged = x.clone()
        nudged.select(axis, 0).copy_(1.01 - x.select(axis, 0))
        others = torch.arange(1, x.shape[axis])
        expected = [part.index_select(axis - vanished, others) for part in flat(result)]
        made = flat(rerun(name, values | {main: nudged}))
        same([part.index_select(axis - vanished, others) for part in made], expected)
    if isinstance(axes, ops.Reduced):
        kept = [size for axis, size in enumerate(x.shape) if axis not in mixed]
        one = [1 if axis in mixed else size for axis, size in enumerate(x.shape)]
        assert list(flat(result)[0].shape) == (one if values.get("keepdim", False) else kept)


@pytest.mark.parametrize(
    ("name", "call", "wrong"),
    [
        ("softmax.int", ((t(2, 4, 6), 1), {}), ops.Along(axis=2)),
        ("cumsum.default", ((t(2, 4, 6), 1), {}), ops.Broadcast()),
        ("max_pool1d.default", ((t(2, 4, 6), [3], [1], [1]), {}), ops.Broadcast()),
        ("conv1d.default", ((t(2, 4, 6), t(4, 4, 3), None, [1], [1]), {}), ops.Contracted(-2, -2, 1, 0)),
        ("layer_norm.default", ((t(2, 6, 8), [6, 8]), {}), ops.Windowed(1, "input")),
    ],
)
def test_a_wrong_row_is_found(name: str, call: Call, wrong: ops.Axes) -> None:
    with pytest.raises(AssertionError):
        check_apart(name, call, wrong)


@pytest.mark.parametrize(("name", "call"), samples(LAYERS))
def test_contraction_weight_axes(name: str, call: Call) -> None:
    axes, values = ops.TABLE[name].axes, named(name, call)
    if not isinstance(axes, ops.Contracted):
        return
    groups = values.get("groups", 1)
    x, weight, made = values[axes.input], values[axes.weight], rerun(name, values)
    inside, outside = x.shape[axes.input_axis], made.shape[axes.output_axis]
    assert weight.shape[axes.weight_in] * (1 if axes.transposed else groups) == inside
    assert weight.shape[axes.weight_out] * (groups if axes.transposed else 1) == outside
    # Reversing the channels of one group on both sides changes nothing.
    order = torch.arange(inside).reshape(groups, -1).flip(1).reshape(-1)
    swapped = weight[order] if axes.transposed else weight.flip(axes.weight_in)
    same(rerun(name, values | {axes.input: x.index_select(axes.input_axis, order), axes.weight: swapped}), made)
