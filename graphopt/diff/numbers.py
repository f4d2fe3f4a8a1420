"""Both models on the same inputs, node by node: where the numbers part, and how the error grows from there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from graphopt.check import tolerance as contract_tolerance
from graphopt.diff.view import View
from graphopt.errors import InputError
from graphopt.fake import dtype_name
from graphopt.model import Model
from graphopt.sample import sample_inputs
from graphopt.signature import TensorSpec
from graphopt.transform import Contract

__all__ = ["NumbersDiff", "PairError", "run_both"]


@dataclass(frozen=True, slots=True)
class PairError:
    """How far the values of a pair are apart: the largest difference over the largest value of either side.

    `error` is None where shapes or dtypes differ, or where the value is no tensor. `within`: no further than rounding,
    or the tolerance that was asked for.
    """

    a: int
    b: int
    error: float | None
    within: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NumbersDiff:
    """What running both has shown.

    Attributes:
        seeded: whether the inputs were random ones, or given.
        profile: the error of every pair that computes something, in the order of the first graph.
        first: the first pair that is off although all it reads from pairs is not; None where none is.
        outputs: the error of each output, None where shapes differ.
    """

    seeded: bool
    profile: tuple[PairError, ...]
    first: PairError | None
    outputs: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "seeded": self.seeded,
            "first": self.first and self.first.to_json(),
            "outputs": list(self.outputs),
            "profile": [row.to_json() for row in self.profile],
        }


def run_both(
    a: View,
    b: View,
    values: Sequence[tuple[int, int]],
    *,
    inputs: Sequence[torch.Tensor] | None = None,
    tolerance: float = 0.0,
) -> NumbersDiff:
    """Run both models side by side and compare what they compute. Values are dropped as soon as they can be.

    Args:
        values: the items of either that should compute the same.
        inputs: the flat tensor inputs of the first model; seeded ones without.
        tolerance: the error that counts as none, beside that of rounding.

    Raises:
        InputError: when the models do not take the same inputs.
    """
    given = list(inputs) if inputs is not None else sample_inputs(a.model)
    a.model.signature.check([(dtype_name(t.dtype), tuple(t.shape)) for t in given])
    others = _inputs_of_second(a.model, b.model, given)
    meets: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for i, j in values:
        meets[0].setdefault(i, []).append(j)
        meets[1].setdefault(j, []).append(i)
    left, right = _Run(a, given, meets[0]), _Run(b, others, meets[1])
    errors: dict[tuple[int, int], PairError] = {}
    with torch.no_grad():
        for run, index in _in_turn(left, right):
            met = meets[0 if run is left else 1].get(index, ())
            for i, j in [(index, other) if run is left else (other, index) for other in met]:
                if i in left.kept and j in right.kept:
                    errors[i, j] = _compare(i, j, left.kept[i], right.kept[j], tolerance)
                    left.drop(i)
                    right.drop(j)
    profile = tuple(row for key, row in sorted(errors.items()) if a.items[key[0]].kind == "call")
    outputs = tuple(_error(x, y) for x, y in zip(left.outputs, right.outputs, strict=False))
    return NumbersDiff(inputs is None, profile, _first(a, profile), outputs)


def _inputs_of_second(a: Model, b: Model, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors for the second model: by name where the names are the same, else in order."""
    specs_a, specs_b = a.signature.tensor_inputs, b.signature.tensor_inputs
    named = dict(zip((spec.name for spec in specs_a), given, strict=True))
    found = [named[spec.name] for spec in specs_b] if named.keys() == {spec.name for spec in specs_b} else given
    try:
        b.signature.check([(dtype_name(t.dtype), tuple(t.shape)) for t in found])
    except InputError as error:
        raise InputError(
            "the two models do not take the same inputs, so there is nothing to run both on",
            where=f"first: ({', '.join(map(str, specs_a))}); second: ({', '.join(map(str, specs_b))})",
            why=error.what,
            todo="compare them without running them, or give inputs that fit both",
        ) from error
    return found


class _Run:
    """One model, a node at a time. `kept` holds the values that are still to be compared."""

    def __init__(self, view: View, inputs: Sequence[torch.Tensor], meets: Mapping[int, Sequence[int]]) -> None:
        model = view.model
        # A model in training mode writes its running statistics.
        self.model = model.clone() if model.mode == "train" else model
        tensors = iter(inputs)
        self.leaves = iter(
            [next(tensors) if isinstance(spec, TensorSpec) else spec.value for spec in model.signature.inputs]
        )
        self.nodes = list(self.model.graph.nodes)
        self.waits = {index: len(others) for index, others in meets.items()}
        self.values: dict[fx.Node, Any] = {}
        self.left = {node: len(node.users) for node in self.nodes}
        self.kept: dict[int, Any] = {}
        self.outputs: list[Any] = []
        self.at = 0

    def step(self) -> int:
        """Compute the next node; returns its number."""
        node, index = self.nodes[self.at], self.at
        self.at += 1
        if node.op == "output":
            found = node.args[0] if isinstance(node.args[0], tuple | list) else [node.args[0]]
            values = [self.values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in found]
            self.outputs = [value for value in values if isinstance(value, torch.Tensor)]
            return index
        value = self._compute(node)
        if self.left[node]:
            self.values[node] = value
        if index in self.waits and node.op != "get_attr":
            self.kept[index] = value
        for source in node.all_input_nodes:
            self.left[source] -= 1
            if not self.left[source]:
                self.values.pop(source, None)
        return index

    def drop(self, index: int) -> None:
        """Note that one comparison with a kept value is done."""
        self.waits[index] -= 1
        if not self.waits[index]:
            del self.kept[index]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.leaves)
        if node.op == "get_attr":
            return self.model.params[str(node.target)].detach()
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _in_turn(left: _Run, right: _Run) -> Iterator[tuple[_Run, int]]:
    """Steps of both, so that each is about as far through its graph as the other."""
    while left.at < len(left.nodes) or right.at < len(right.nodes):
        done = [run.at / max(len(run.nodes), 1) for run in (left, right)]
        run = left if done[0] <= done[1] and left.at < len(left.nodes) else right
        if run.at >= len(run.nodes):
            run = left
        yield run, run.step()


def _compare(i: int, j: int, x: Any, y: Any, tolerance: float) -> PairError:
    error = _error(x, y)
    dtype = x.dtype if isinstance(x, torch.Tensor) else torch.int64
    limit = max(tolerance, contract_tolerance(Contract.EXACT, dtype))
    return PairError(i, j, error, error is not None and error <= limit)


def _error(x: Any, y: Any) -> float | None:
    """The largest difference over the largest value of either; infinite where one is NaN and the other is not."""
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return (0.0 if x == y else math.inf) if isinstance(x, int | float) and isinstance(y, int | float) else None
    if x.shape != y.shape or x.dtype != y.dtype:
        return None
    if not x.numel() or torch.equal(x, y):
        return 0.0
    wide = torch.complex128 if x.dtype.is_complex else torch.float64
    u, v = x.detach().to(wide), y.detach().to(wide)
    odd = ~(torch.isfinite(u) & torch.isfinite(v))
    if bool(odd.any()):
        if not torch.equal(torch.nan_to_num(u[odd]), torch.nan_to_num(v[odd])):
            return math.inf
        u, v = u[~odd], v[~odd]
        if not u.numel():
            return 0.0
    scale = max(float(u.abs().max()), float(v.abs().max()))
    return float((u - v).abs().max()) / scale if scale else 0.0


def _first(a: View, profile: Sequence[PairError]) -> PairError | None:
    """The first that is off though all it reads is not; else, where shapes hide what it reads, the first of all."""
    off = {row.a for row in profile if not row.within}
    wrong = [row for row in profile if row.error is not None and not row.within]
    clean = [row for row in wrong if not any(source in off for _, source in a.data_operands(row.a))]
    return next(iter(clean or wrong), None)
