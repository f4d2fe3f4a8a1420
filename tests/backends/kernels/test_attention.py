"""Attention against float64: heads, lengths, widths, masks, orders, free sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.attention import Operand, attention, attention_kernel
from graphopt.backends.tvm.kernels.machine import Machine
from tests.backends.kernels.building import a_machine, apply, bias_residual_relu, examples, operand, size
from tests.backends.kernels.typed import TypedLibrary, compiled_typed
from tests.compare import relative_error

LIMIT = 2e-6
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """Attention of query [*lead, length, width], key [*lead, keys, width] and value [*lead, keys, depth].

    Attributes:
        groups: heads of keys and values, where they have fewer.
        mask: the mask's shape.
        added: whether the mask is added; otherwise it tells which scores count.
        orders: in which the axes of query, key, value, mask and result lie; as they are named where there is none.
        followed: whether relu(result + bias + residual) follows.
    """

    lead: tuple[int, ...] = (2,)
    length: int = 5
    keys: int = 7
    width: int = 8
    depth: int = 8
    groups: int | None = None
    mask: tuple[int, ...] | None = None
    added: bool = False
    causal: bool = False
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    machine: Machine = field(default_factory=a_machine)
    followed: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        fewer = self.lead if self.groups is None else (*self.lead[:-1], self.groups)
        shapes = {
            "query": (*self.lead, self.length, self.width),
            "key": (*fewer, self.keys, self.width),
            "value": (*fewer, self.keys, self.depth),
        }
        return shapes if self.mask is None else shapes | {"mask": self.mask}

    @property
    def result(self) -> tuple[int, ...]:
        shape = (*self.lead, self.length, self.depth)
        return tuple(shape[axis] for axis in self.order("result", len(shape)))

    def order(self, name: str, rank: int) -> tuple[int, ...]:
        return self.orders.get(name, tuple(range(rank)))

    def lowered(self, free: Mapping[int, Any] | None = None) -> Any:
        """The kernel; `free` has the variables of the sizes that are free."""
        operands = {}
        for name, shape in self.shapes.items():
            order = self.order(name, len(shape))
            sizes = [(free or {}).get(n, n) for n in shape]
            dtype = "bool" if name == "mask" and not self.added else "float32"
            operands[name] = Operand(operand(*(sizes[axis] for axis in order), dtype=dtype, name=name), order)
        query, key, value = (operands[name] for name in ("query", "key", "value"))
        order = "".join(map(str, self.order("result", len(self.shapes["query"]))))
        result = attention(query, key, value, operands.get("mask"), SCALE, causal=self.causal, order=order)
        tensors = [operand.tensor for operand in operands.values()]
        if self.followed:
            bias, residual = operand(result.shape[-1], name="bias"), operand(*result.shape, name="residual")
            tensors, result = [*tensors, bias, residual], bias_residual_relu(result, bias, residual)
        return apply(attention_kernel, self.machine, tensors, result)

    def values(self) -> dict[str, Tensor]:
        """Random operands; a mask lets about three of four scores count."""
        made = {name: torch.randn(shape) for name, shape in self.shapes.items()}
        if self.mask is not None and not self.added:
            made["mask"] = made["mask"] > -0.7
        return made

    def reference(self, values: Mapping[str, Tensor]) -> Tensor:
        q, k, v = (values[name].double() for name in ("query", "key", "value"))
        if self.groups is not None:
            k, v = (x.repeat_interleave(self.lead[-1] // self.groups, -3) for x in (k, v))
        scores = q @ k.mT * SCALE
        if self.causal:
            scores = scores.masked_fill(torch.ones(self.length, self.keys).tril() == 0, -math.inf)
        if self.mask is not None:
            mask = values["mask"]
            scores = scores + mask if self.added else scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
        result = weights @ v
        return result.permute(self.order("result", result.ndim))

    def error(self, kernel: TypedLibrary, values: Mapping[str, Tensor] | None = None, factor: float = 1.0) -> float:
        """The error of a kernel, whose query is multiplied by a factor."""
        values = self.values() if values is None else values
        expected = self.reference(values)
        given = values | {"query": values["query"] * factor}
        stored = [given[name].permute(self.order(name, len(shape))) for name, shape in self.shapes.items()]
        if self.followed:
            bias, residual = torch.randn(self.result[-1]), torch.randn(self.result)
            stored, expected = [*stored, bias, residual], (expected + bias + residual).relu()
        return relative_error(kernel(stored, self.result, torch.float32).double(), expected)


def libraries(functions: Mapping[str, Any]) -> dict[str, TypedLibrary]:
    """Machine code of kernels, with exp as it is by default."""
    return compiled_typed(functions)


def check(cases: Mapping[str, Case]) -> None:
    """All cases in one library."""
    kernels = libraries({f"kernel_{i}": case.lowered() for i, case in enumerate(cases.values())})
    errors = {name: case.error(kernel) for (name, case), kernel in zip(cases.items(), kernels.values(), strict=True)}
    assert all(error < LIMIT for error in errors.values()), {n: e for n, e in errors.items() if not e < LIMIT}


def test_heads_and_grouped_queries() -> None:
    check({str(lead): Case(lead) for lead in ((), (1,), (2, 3), (2, 1, 2))})
    check({str(groups): Case((2, 6), groups=groups) for groups in (1, 2, 6)})
    check({"one axis": Case((4,), groups=2), "three axes": Case((2, 1, 4), groups=1)})


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_lengths_around_vectors_and_blocks(lanes: int) -> None:
    """A block is of two vectors of queries: 8, 16, 32 of them."""
    machine, block = a_machine(lanes), 2 * lanes
    lengths = [1, lanes - 1, lanes, lanes + 1, block - 1, block, 2 * block + 3]
    if lanes != 8:
        lengths = [lanes + 1, block + 1]
    check({str(length): Case(length=length, depth=lanes, machine=machine) for length in lengths})


def test_numbers_of_keys() -> None:
    check({str(keys): Case(keys=keys, length=3) for keys in (1, 6, 13, 37)})
    check({str(keys): Case(keys=keys, length=17, machine=a_machine(16), depth=16) for keys in (15, 31)})


def test_widths_that_do_not_fill_vectors_and_values_of_another_width() -> None:
    check({f"width {width}": Case(width=width) for width in (1, 7, 20)})
    check({f"depth {depth}": Case(width=5, depth=depth) for depth in (9, 15, 33, 64)})


SHAPES = [*itertools.product((3, 1), (5, 1), (7, 1)), *itertools.product((5, 1), (7, 1))]
LARGER = [(2, 3, 5, 7), (2, 1, 1, 7), (1, 3, 5, 1), (1, 1, 5, 7)]


@pytest.mark.parametrize("added", [False, True], ids=["bool", "float"])
def test_masks_of_every_shape(added: bool) -> None:
    usual = Case((3,), 5, 7, 4, 4, added=added, machine=a_machine(4))
    check({str(shape): replace(usual, mask=shape) for shape in SHAPES})
    check({str(shape): replace(usual, lead=(2, 3), mask=shape) for shape in LARGER[added::2]})


def test_causal() -> None:
    """The mask is aligned to the upper left, whether there are more queries or more keys."""
    sizes = [(1, 9), (18, 18), (4, 7), (20, 3)]
    check({str(pair): Case(length=pair[0], keys=pair[1], causal=True) for pair in sizes})
    check(
        {
            "grouped": Case((2, 4), groups=2, causal=True, length=9, keys=9),
            "masked": Case((2,), causal=True, length=9, keys=9, mask=(9, 9)),
            "added": Case((2,), causal=True, length=9, keys=9, mask=(1, 9), added=True),
        }
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "float"])
def test_rows_of_which_nothing_counts_give_zeros(added: bool, causal: bool) -> None:
    case = Case((2,), length=19, keys=9, mask=(2, 19, 9), added=added, causal=causal)
    kernels, values = both(case), case.values()
    hidden = torch.zeros(2, 19, 9, dtype=torch.bool)
    hidden[0, 0], hidden[0, 7], hidden[1, 18], hidden[1, 3, 1:] = True, True, True, True
    mask = values["mask"]
    values["mask"] = mask.masked_fill(hidden, -math.inf if added else False)
    for kernel in kernels:
        assert case.error(kernel, values) < LIMIT
        ours = kernel(list(values.values()), case.result, torch.float32)
        assert not ours[[0, 0, 1], [0, 7, 18]].any()


def both(case: Case) -> Sequence[TypedLibrary]:
    """The kernel with exp in arithmetic, and with that of the C library."""
    function = case.lowered()
    return [*libraries({"kernel": function}).values(), *compiled_typed({"kernel": function}).values()]


@pytest.mark.parametrize("mask", [None, (1, 9)], ids=str)
def test_nan_and_infinities_stay_where_they_are(mask: tuple[int, ...] | None) -> None:
    """In the rows that they reach, and in no other; a mask of booleans hides the scores of keys, not their values."""
    case = Case((2,), length=18, keys=9, mask=mask)
    kernels = both(case)
    for where, wrong in itertools.product(("query", "key", "value"), (math.nan, math.inf)):
        values = case.values()
        if case.mask is not None:
            values["mask"] = torch.arange(9).view(1, 9) != 4
        values[where][0, 4, 2] = wrong
        assert case.reference(values)[0].isfinite().all() == (where == "key" and case.mask is not None)
        for kernel in kernels:
            assert case.error(kernel, values) < LIMIT, (where, wrong)


def test_scores_beyond_the_reach_of_exp() -> None:
    case = Case((2,), length=18, keys=9)
    values = case.values()
    values["query"] = values["query"] * 100
    for kernel in both(case):
        assert case.error(kernel, values) < 1e-4


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3)]


def test_orders() -> None:
    """Query, key, value, mask and result, each with its heads before or after its places."""
    cases = {}
    for query, key, value in itertools.product(ORDERS, repeat=3):
        orders = {"query": query, "key": key, "value": value, "result": key if query == value else value}
        cases[str(orders)] = Case((2, 3), orders=orders)
    check(cases)


def test_other_orders() -> None:
    swapped = (0, 2, 1, 3)
    everything = dict.fromkeys(("query", "key", "value", "result"), swapped)
    check(
        {
            "features before places": Case((2, 3), orders={"query": (0, 1, 3, 2), "key": (3, 0, 1, 2)}),
            "heads first": Case((2, 3), orders={"value": (1, 0, 2, 3), "key": (1, 2, 0, 3)}),
            "three axes": Case((2,), orders=dict.fromkeys(everything, (1, 0, 2))),
            "mask": Case((2, 3), mask=(2, 3, 5, 7), orders=everything | {"mask": (0, 2, 3, 1)}),
            "mask of ones": Case((2, 3), mask=(2, 1, 1, 7), added=True, orders=everything | {"mask": (3, 1, 0, 2)}),
            "grouped": Case((2, 4), groups=2, length=17, orders=everything),
            "grouped, followed": Case((2, 4), groups=2, length=17, orders=everything, followed=True),
        }
    )


def test_what_follows() -> None:
    check(
        {
            "plain": Case((2, 3), length=18, depth=11, followed=True),
            "turned": Case((2, 3), length=18, depth=11, followed=True, orders={"result": (0, 2, 1, 3)}),
            "masked": Case((2, 3), length=3, mask=(1, 1, 3, 7), causal=True, followed=True),
        }
    )


BATCH, LENGTH, KEYS = 90, 91, 92
"""Sizes that stand for free ones."""


@pytest.mark.parametrize("free", [(BATCH,), (LENGTH,), (KEYS,), (BATCH, LENGTH, KEYS)], ids=str)
def test_free_sizes(free: tuple[int, ...]) -> None:
    usual = {BATCH: 2, LENGTH: 17, KEYS: 7}
    calls = {BATCH: (1, 2, 5), LENGTH: (1, 7, 16, 17, 33), KEYS: (1, 5, 6, 7, 13, 40)}
    sizes = {number: number if number in free else one for number, one in usual.items()}
    n, length, keys = sizes.values()
    swapped = (0, 2, 1, 3)
    orders = dict.fromkeys(("query", "key", "value", "result"), swapped)
    shape = Case((n, 4), length, keys)
    cases = [
        shape,
        replace(shape, groups=2, causal=True, followed=True, orders=orders),
        replace(shape, mask=(n, 1, length, keys), depth=9),
        replace(shape, mask=(n, 1, 1, keys), added=True, machine=a_machine(4)),
    ]
    variables = {number: size(f"n{number}") for number in free}
    cases = cases if len(free) > 1 else cases[1:2]
    kernels = list(libraries({f"kernel_{i}": case.lowered(variables) for i, case in enumerate(cases)}).values())
    combinations = itertools.product(*(calls[number] for number in free))
    for combination in itertools.islice(combinations, 0, None, len(free) ** 2):
        known = dict(zip(free, combination, strict=True))
        for case, kernel in zip(cases, kernels, strict=True):
            assert _with(case, known).error(kernel) < LIMIT, (known, case)


def _with(case: Case, known: Mapping[int, int]) -> Case:
    def of(number: int) -> int:
        return known.get(number, number)

    return replace(
        case,
        lead=tuple(map(of, case.lead)),
        length=of(case.length),
        keys=of(case.keys),
        mask=None if case.mask is None else tuple(map(of, case.mask)),
    )


def test_no_queries_or_keys_at_all() -> None:
    """Where the sizes are free: nothing is written, and without keys zeros."""
    free = {LENGTH: size("length"), KEYS: size("keys")}
    case = Case((2,), LENGTH, KEYS)
    kernel = libraries({"kernel": case.lowered(free)})["kernel"]
    for length, keys in ((0, 3), (3, 0), (0, 0), (17, 0)):
        assert _with(case, {LENGTH: length, KEYS: keys}).error(kernel) < LIMIT, (length, keys)


@examples(4)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    widths=st.tuples(st.integers(1, 40), st.integers(0, 30)),
    times=st.integers(1, 3),
    masked=st.sampled_from((None, False, True)),
    ones=st.tuples(st.booleans(), st.booleans()),
    causal=st.booleans(),
    swapped=st.tuples(*[st.booleans()] * 4),
    lanes=st.sampled_from((4, 8, 16)),
    followed=st.booleans(),
)
def test_any_attention(
    lead: list[int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    times: int,
    masked: bool | None,
    ones: tuple[bool, bool],
    causal: bool,
    swapped: Sequence[bool],
    lanes: int,
    followed: bool,
) -> None:
    groups = lead[-1] if lead and times > 1 else None
    heads = (*lead[:-1], lead[-1] * times) if groups else tuple(lead)
    rank = len(heads) + 2
    turned = (*range(rank - 3), rank - 2, rank - 3, rank - 1) if rank > 2 else (0, 1)
    names = ("query", "key", "value", "result")
    case = Case(
        heads,
        *lengths,
        widths[0],
        lanes + widths[1],
        groups=groups,
        mask=None if masked is None else tuple(1 if one else n for one, n in zip(ones, lengths, strict=True)),
        added=bool(masked),
        causal=causal,
        orders={name: turned for name, swap in zip(names, swapped, strict=True) if swap},
        machine=a_machine(lanes, threads=2),
        followed=followed,
    )
    check({"kernel": case})


def test_what_is_refused() -> None:
    """Values narrower than a vector, or whose features do not lie side by side; free widths."""
    assert Case(depth=8).lowered() is not None
    assert Case(depth=7).lowered() is None
    assert Case(depth=8, machine=a_machine(16)).lowered() is None
    assert Case(orders={"value": (0, 2, 1)}).lowered() is None
    assert Case(width=64).lowered({64: size()}) is None
    assert Case(depth=64).lowered({64: size()}) is None
    assert Case(width=64, depth=65).lowered({}) is not None


def test_what_follows_may_read_the_result_in_place_only() -> None:
    q, k, v = (operand(2, 8, 8, name=name) for name in "qkv")
    query, key, value = (Operand(tensor, (0, 1, 2)) for tensor in (q, k, v))
    result = attention(query, key, value, None, SCALE, causal=False, order="012")
    for name, (element, taken) in {
        "in place": (lambda b, i, j: result(b, i, j) * 2, True),
        "beside the query": (lambda b, i, j: result(b, i, j) + q(b, i, j), True),
        "turned": (lambda b, i, j: result(b, j, i), False),
        "the first row": (lambda b, i, j: result(b, i, j) - result(b, 0, j), False),
        "moved": (lambda b, i, j: result(b, i, tirx.min(j + 1, 7)), False),
    }.items():
        last = te.compute((2, 8, 8), element, name="last")
        assert (apply(attention_kernel, a_machine(), [q, k, v], last) is not None) == taken, name


def test_one_percent_is_seen() -> None:
    cases = {"kernel": Case((2, 3), length=17), "masked": Case((2, 3), mask=(5, 7))}
    kernels = libraries({name: case.lowered() for name, case in cases.items()})
    for name, case in cases.items():
        assert case.error(kernels[name], factor=1.01) > 5e-4
        values = case.values()
        expected, ours = case.reference(values), kernels[name](list(values.values()), case.result, torch.float32)
        assert relative_error(ours.double() * 1.01, expected) > 1e-3
