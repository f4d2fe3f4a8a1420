"""Chains, broadcasts, transpositions, gathers and casts against torch in float64, of any size and with free sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.elementwise import elementwise_kernel
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.schedule import ELEMENTARY
from tests.backends.kernels.building import a_machine, examples, operand, size
from tests.backends.kernels.typed import TypedLibrary, compiled_typed
from tests.compare import relative_error

LIMIT = 1e-6
VECTOR_CALLS = [f"{name}:float32" for name in ELEMENTARY]


def lowered(operands: Sequence[te.Tensor], result: te.Tensor, machine: Machine | None = None) -> Any | None:
    """The kernel, with elementary functions as they are by default; None when it is refused."""
    function = te.create_prim_func([*operands, result], "int64")
    return elementwise_kernel(function, machine or a_machine(), VECTOR_CALLS)


@dataclass(frozen=True)
class Case:
    """A result computed element by element.

    Attributes:
        operands: shapes of what is read.
        shape: of the result.
        element: an element of the result, from the operands and its place.
        reference: the result, from the operands.
    """

    operands: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    element: Callable[..., Any]
    reference: Callable[..., Tensor]
    machine: Machine = field(default_factory=a_machine)

    def lowered(self, free: Mapping[int, Any] | None = None) -> Any:
        """The kernel; `free` has the variables of the sizes that are free."""
        free = free or {}
        made = [operand(*(free.get(n, n) for n in shape), name=f"x{i}") for i, shape in enumerate(self.operands)]
        result = te.compute([free.get(n, n) for n in self.shape], partial(self._element, made), name="y")
        return lowered(made, result, self.machine)

    def _element(self, operands: Sequence[te.Tensor], *place: Any) -> Any:
        return self.element(*operands, *place)

    def error(self, kernel: TypedLibrary, factor: float = 1.0) -> float:
        """The error of a kernel, whose first operand is multiplied by a factor."""
        values = [torch.randn(shape) for shape in self.operands]
        expected = self.reference(*(value.double() for value in values)).expand(self.shape)
        ours = kernel([values[0] * factor, *values[1:]], self.shape, torch.float32)
        return relative_error(ours.double(), expected)


def check(*cases: Case) -> None:
    """All cases in one library."""
    kernels = compiled_typed({f"kernel_{i}": case.lowered() for i, case in enumerate(cases)})
    errors = {i: case.error(kernel) for i, (case, kernel) in enumerate(zip(cases, kernels.values(), strict=True))}
    assert all(error < LIMIT for error in errors.values()), {
        str(cases[i]): e for i, e in errors.items() if not e < LIMIT
    }


def in_place(shape: tuple[int, ...], machine: Machine | None = None) -> Case:
    """Two operands of the shape of the result."""
    return Case(
        (shape, shape), shape, lambda a, b, *i: a(*i) * 2 + tirx.exp(b(*i)), lambda a, b: a * 2 + b.exp(),
        machine or a_machine(),
    )  # fmt: skip


def broadcast(shape: tuple[int, ...], own: Sequence[tuple[int, ...]], machine: Machine | None = None) -> Case:
    """x * a + b + ..., where a, b, ... have fewer axes than x, or ones."""

    def read(tensor: te.Tensor, shape: tuple[int, ...], place: Sequence[Any]) -> Any:
        return tensor(*(0 if n == 1 else i for n, i in zip(shape, place[len(place) - len(shape) :], strict=True)))

    def element(*given: Any) -> Any:
        tensors, place = given[: len(own) + 1], given[len(own) + 1 :]
        value = tensors[0](*place) * read(tensors[1], own[0], place)
        for tensor, shape in zip(tensors[2:], own[1:], strict=True):
            value = value + read(tensor, shape, place)
        return value

    def reference(x: Tensor, first: Tensor, *others: Tensor) -> Tensor:
        return x * first + sum(others)

    return Case((shape, *own), shape, element, reference, machine or a_machine())


def turned(sizes: tuple[int, ...], *orders: tuple[int, ...], machine: Machine | None = None) -> Case:
    """The sum of operands that lie in other orders; the k-th axis in memory is axis order[k] of the result."""

    def element(*given: Any) -> Any:
        tensors, place = given[: len(orders)], given[len(orders) :]
        return sum(
            (1 + n) * tensor(*(place[axis] for axis in order))
            for n, (tensor, order) in enumerate(zip(tensors, orders, strict=True))
        )

    def reference(*values: Tensor) -> Tensor:
        back = [[order.index(axis) for axis in range(len(sizes))] for order in orders]
        total = sum((1 + n) * value.permute(order) for n, (value, order) in enumerate(zip(values, back, strict=True)))
        assert isinstance(total, Tensor)
        return total

    return Case(
        tuple(tuple(sizes[axis] for axis in order) for order in orders), sizes, element, reference,
        machine or a_machine(),
    )  # fmt: skip


def test_every_width() -> None:
    check(*(in_place((3, width)) for width in (*range(1, 18), 23, 24, 25, 33)))
    for lanes in (4, 16):
        widths = (1, lanes - 1, lanes, lanes + 1, 3 * lanes - 1, 5 * lanes)
        check(*(in_place((width,), a_machine(lanes)) for width in widths))


def test_shapes_with_axes_of_one_element() -> None:
    check(*(in_place(s) for s in ((1,), (1, 1), (1, 5), (5, 1), (1, 1, 1), (3, 1, 5), (1, 3, 1, 19), (2, 3, 4, 5, 1))))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 3, 5), (2, 0, 5)], ids=str)
def test_results_without_elements(shape: tuple[int, ...]) -> None:
    check(in_place(shape))


def test_broadcasts() -> None:
    shape = (2, 3, 4, 5)
    owns = [
        (own,)
        for rank in range(1, 5)
        for own in itertools.product(*[(n, 1) for n in shape[4 - rank :]])
        if rank == 4 or 1 in own or rank < 3
    ]
    check(*(broadcast(shape, own) for own in owns))
    several = [((5,), (3, 1, 1)), ((2, 1, 1, 5), (4, 1), (1,)), ((1, 3, 4, 5), (4, 5), (2, 1, 1, 1))]
    check(*(broadcast(shape, own) for own in several))


def test_a_number_for_all_elements() -> None:
    check(broadcast((3, 19), [()]), broadcast((2, 3, 8), [(8,), ()]), broadcast((5,), [(), (1,)]))


@pytest.mark.parametrize("sizes", [(3, 5, 7), (2, 17, 24), (1, 9, 4)], ids=str)
def test_every_permutation_of_three_axes(sizes: tuple[int, ...]) -> None:
    """By itself, and beside an operand in place or in the opposite order."""
    orders = list(itertools.permutations(range(3)))
    check(*(turned(sizes, order) for order in orders))
    if sizes == (3, 5, 7):
        check(*(turned(sizes, (0, 1, 2), order) for order in orders[1:]))
        check(*(turned(sizes, order, orders[-1 - i]) for i, order in enumerate(orders)))


def test_permutations_of_two_and_four_axes() -> None:
    check(
        turned((9, 11), (1, 0)),
        turned((9, 11), (1, 0), (0, 1)),
        *(turned((2, 3, 4, 9), order) for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 1, 0))),
    )


def test_work_large_enough_to_be_divided_among_threads() -> None:
    machine = a_machine(threads=2)
    check(
        in_place((90000,), machine),
        in_place((2, 8, 4096), machine),
        in_place((3, 30001), machine),
        broadcast((2, 64, 512), [(64, 1)], machine),
        turned((64, 40, 33), (0, 2, 1), machine=machine),
        turned((1, 4096, 16), (0, 2, 1), machine=machine),
    )


def test_chains_of_blocks() -> None:
    """Steps that a compiler has fused: each reads the one before it, one of them twice, one of them moved."""
    x, b = operand(3, 19), operand(19, name="b")
    biased = te.compute((3, 19), lambda i, j: x(i, j) + b(j), name="biased")
    gate = te.compute((3, 19), lambda i, j: tirx.sigmoid(biased(i, j)), name="gate")
    product = te.compute((3, 19), lambda i, j: biased(i, j) * gate(i, j), name="product")
    back = te.compute((19, 3), lambda i, j: product(j, i), name="back")
    last = te.compute((19, 3), lambda i, j: tirx.exp(back(i, j)) - back(i, j), name="last")
    kernel = compiled_typed({"kernel": lowered([x, b], last)})["kernel"]
    value, bias = torch.randn(3, 19), torch.randn(19)
    silu = torch.nn.functional.silu(value.double() + bias).T
    ours = kernel([value, bias], (19, 3), torch.float32)
    assert relative_error(ours.double(), silu.exp() - silu) < LIMIT


def test_padding_reads_nothing_that_is_not_there() -> None:
    x = operand(3, 9)

    def padded(i: Any, j: Any) -> Any:
        return tirx.if_then_else(tirx.all(j >= 2, j < 11, i >= 1), x(i - 1, j - 2), tirx.const(-1, "float32"))

    kernel = compiled_typed({"kernel": lowered([x], te.compute((4, 14), padded, name="y"))})["kernel"]
    value = torch.randn(3, 9)
    expected = torch.nn.functional.pad(value, (2, 3, 1, 0), value=-1)
    assert torch.equal(kernel([value], (4, 14), torch.float32), expected)


def test_slices_strides_and_flips() -> None:
    x = operand(6, 21)
    elements: dict[str, tuple[tuple[int, int], Callable[..., Any], Callable[[Tensor], Tensor]]] = {
        "slice": ((3, 11), lambda i, j: x(i + 2, j + 4), lambda v: v[2:5, 4:15]),
        "strided": ((3, 7), lambda i, j: x(i * 2, j * 3), lambda v: v[::2, ::3]),
        "flip": ((6, 21), lambda i, j: x(5 - i, 20 - j), lambda v: v.flip(0, 1)),
        "column": ((6, 21), lambda i, j: x(i, 4), lambda v: v[:, 4:5].expand(6, 21)),
        "turned_slice": ((11, 3), lambda i, j: x(j + 2, i + 4), lambda v: v[2:5, 4:15].T),
        "flattened": ((126, 1), lambda i, j: x(tirx.floordiv(i, 21), tirx.floormod(i, 21)), lambda v: v.view(126, 1)),
        "place": ((4, 9), lambda i, j: x(i, j) * 0 + tirx.Cast("float32", i * 9 + j), lambda v: torch.arange(36.0)),
    }  # fmt: skip
    kernels = compiled_typed(
        {name: lowered([x], te.compute(shape, element, name="y")) for name, (shape, element, _) in elements.items()}
    )
    value = torch.randn(6, 21)
    for name, (shape, _, reference) in elements.items():
        assert torch.equal(kernels[name]([value], shape, torch.float32), reference(value).view(shape)), name


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_gathers(dtype: str) -> None:
    table, rows, columns = operand(7, 19), operand(5, dtype=dtype, name="r"), operand(19, dtype=dtype, name="c")
    pairs = operand(2, 5, dtype=dtype, name="p")
    functions = {
        "rows": ([table, rows], te.compute((5, 19), lambda i, j: table(rows(i), j), name="y")),
        "columns": ([table, columns], te.compute((7, 19), lambda i, j: table(i, columns(j)), name="y")),
        "both": ([table, rows, columns], te.compute((5, 19), lambda i, j: table(rows(i), columns(j)), name="y")),
        "batch": ([table, pairs], te.compute((2, 5, 19), lambda n, i, j: table(pairs(n, i), j) * 2, name="y")),
        "turned": ([table, rows], te.compute((19, 5), lambda i, j: table(rows(j), i), name="y")),
    }
    kernels = compiled_typed({name: lowered(*given) for name, given in functions.items()})
    t, kind = torch.randn(7, 19), getattr(torch, dtype)
    r, c, p = (torch.randint(n, shape) for n, shape in ((7, (5,)), (19, (19,)), (7, (2, 5))))
    expected = {
        "rows": ([r], t[r]),
        "columns": ([c], t[:, c]),
        "both": ([r, c], t[r][:, c]),
        "batch": ([p], t[p] * 2),
        "turned": ([r], t[r].T),
    }
    for name, (places, result) in expected.items():
        ours = kernels[name]([t, *(x.to(kind) for x in places)], result.shape, torch.float32)
        assert torch.equal(ours, result), name


DTYPES = ["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"]


@pytest.mark.parametrize("source", DTYPES)
def test_casts(source: str) -> None:
    """Between all dtypes: whole numbers and fractions, which are cut off, and are true."""
    x = operand(2, 19, dtype=source)

    def cast(dtype: str, *place: Any) -> Any:
        if dtype == "bool" != source:
            return x(*place) != tirx.const(0, source)
        return tirx.Cast(dtype, x(*place))

    kernels = compiled_typed(
        {dtype: lowered([x], te.compute((2, 19), partial(cast, dtype), name="y")) for dtype in DTYPES}
    )
    value = torch.arange(38).view(2, 19).double() * 0.75
    for signed in (False, True):
        sign = -1 if signed and source != "uint8" else 1
        given = (value * sign).to(getattr(torch, source))
        for dtype in DTYPES:
            if dtype == "uint8" and sign < 0:
                continue  # not defined in C
            kind = getattr(torch, dtype)
            assert torch.equal(kernels[dtype]([given], (2, 19), kind), given.to(kind)), (dtype, sign)


def test_chains_in_other_dtypes() -> None:
    a, b = operand(3, 19, dtype="int64", name="a"), operand(19, dtype="float64", name="b")
    m = operand(3, 19, dtype="bool", name="m")
    functions = {
        "where": te.compute((3, 19), lambda i, j: tirx.Select(m(i, j), tirx.Cast("float64", a(i, j)), b(j)), name="y"),
        "compare": te.compute((3, 19), lambda i, j: tirx.all(m(i, j), a(i, j) > 3), name="y"),
        "wide": te.compute((3, 19), lambda i, j: a(i, j) * tirx.const(1 << 40, "int64"), name="y"),
        "exp": te.compute((3, 19), lambda i, j: tirx.exp(b(j)) + tirx.Cast("float64", m(i, j)), name="y"),
    }
    kernels = compiled_typed({name: lowered([a, b, m], result) for name, result in functions.items()})
    given = [torch.randint(-9, 9, (3, 19)), torch.randn(19).double(), torch.randn(3, 19) > 0]
    x, y, mask = given
    expected = {
        "where": torch.where(mask, x.double(), y),
        "compare": mask & (x > 3),
        "wide": x << 40,
        "exp": y.exp() + mask,
    }
    for name, result in expected.items():
        ours = kernels[name](given, (3, 19), result.dtype)
        assert relative_error(ours, result) < 1e-15, name


def test_nan_and_infinities() -> None:
    x = operand(3, 19)
    y = te.compute((3, 19), lambda i, j: x(i, j) * 2 + 1, name="y")
    kernel = compiled_typed({"kernel": lowered([x], y)})["kernel"]
    value = torch.randn(3, 19)
    value[0, 3], value[1, 18], value[2, 0] = math.nan, math.inf, -math.inf
    assert relative_error(kernel([value], (3, 19), torch.float32).double(), value.double() * 2 + 1) < LIMIT


FREE = (90, 91, 92)
"""Sizes that stand for free ones."""

FREE_CASES = {
    "one row": (in_place((90,)), [(0,), (1,), (7,), (8,), (9,), (70,)]),
    "rows": (in_place((90, 11)), [(0,), (1,), (5,)]),
    "width": (in_place((3, 90)), [(0,), (1,), (7,), (8,), (27,)]),
    "all": (in_place((90, 91, 92)), [(1, 1, 1), (2, 3, 9), (0, 3, 9), (2, 0, 9), (2, 3, 0), (3, 1, 16)]),
    "merged": (in_place((90, 3, 5)), [(0,), (1,), (4,)]),
    "bias": (broadcast((90, 5, 9), [(9,), (5, 1)]), [(0,), (1,), (4,)]),
    "free bias": (broadcast((3, 90), [(90,), (3, 1)]), [(0,), (1,), (19,)]),
    "free middle": (broadcast((2, 90, 9), [(90, 1), (1, 9)]), [(0,), (1,), (4,)]),
    "turned": (turned((90, 91), (1, 0)), [(1, 1), (9, 5), (0, 4), (4, 0)]),
    "turned in part": (turned((2, 90, 11), (0, 2, 1)), [(1,), (13,), (0,)]),
}  # fmt: skip


def test_free_sizes() -> None:
    variables = {number: size(f"n{number}") for number in FREE}
    kernels = compiled_typed({n.replace(" ", "_"): case.lowered(variables) for n, (case, _) in FREE_CASES.items()})
    for name, (case, calls) in FREE_CASES.items():
        for call in calls:
            known = dict(zip(FREE, call, strict=False))
            shapes = [tuple(known.get(n, n) for n in shape) for shape in (*case.operands, case.shape)]
            one = Case(tuple(shapes[:-1]), shapes[-1], case.element, case.reference)
            assert one.error(kernels[name.replace(" ", "_")]) < LIMIT, (name, call)


@examples(6)
@given(data=st.data(), lanes=st.sampled_from((4, 8, 16)), threads=st.integers(1, 4))
def test_any_sum_of_turned_and_broadcast_operands(data: st.DataObject, lanes: int, threads: int) -> None:
    sizes = tuple(data.draw(st.lists(st.one_of(st.integers(1, 4), st.integers(0, 40)), min_size=1, max_size=4)))
    machine, axes = a_machine(lanes, threads), range(len(sizes))
    orders = data.draw(st.lists(st.permutations(axes).map(tuple), min_size=1, max_size=3))
    kept = data.draw(st.lists(st.sets(st.sampled_from(axes)), min_size=1, max_size=3))
    owns = [tuple(n if axis in keep else 1 for axis, n in enumerate(sizes)) for keep in kept]
    check(turned(sizes, *orders, machine=machine), broadcast(sizes, owns, machine))


def test_what_is_refused() -> None:
    """Sums, blocks that stay beside each other, and expressions that grow without bound."""
    x = operand(8, 8)
    k = te.reduce_axis((0, 8), "k")
    total = te.compute((8,), lambda i: te.sum(x(i, k), axis=[k]), name="total")
    assert lowered([x], total) is None
    assert lowered([x], te.compute((8,), lambda i: total(i) * 2, name="twice")) is None
    value = x
    for _ in range(6):
        value = _squared(value)
    assert lowered([x], value) is not None
    for _ in range(8):
        value = _squared(value)
    assert lowered([x], value) is None
    scalar = operand(name="scalar")
    assert lowered([scalar], te.compute((), lambda: scalar() * 2, name="y")) is None


def _squared(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: x(*i) * x(*i), name="squared")


def test_one_percent_is_seen() -> None:
    cases = [in_place((3, 19)), broadcast((2, 3, 4), [(3, 1), (4,)]), turned((3, 5, 7), (2, 0, 1)), in_place((1, 1))]
    kernels = compiled_typed({f"kernel_{i}": case.lowered() for i, case in enumerate(cases)})
    for case, kernel in zip(cases, kernels.values(), strict=True):
        assert case.error(kernel, factor=1.01) > 1e-3
