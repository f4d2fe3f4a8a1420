"""Products of two computed matrices against float64: orders, broadcast leading axes, free sizes, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.matmul import matmul, matmul_kernel
from tests.backends.kernels.building import a_machine, apply, bias_residual_relu, compiled, examples, operand, size
from tests.backends.kernels.typed import TypedLibrary, compiled_typed
from tests.compare import relative_error

LIMIT = 2e-6
TURNED = {2: (1, 0), 3: (0, 2, 1), 4: (0, 1, 3, 2)}
"""The order of a right operand whose columns lie far from one another, by its rank."""


@dataclass(frozen=True)
class Case:
    """left [*left_lead, rows, depth] times right [*right_lead, depth, columns].

    Attributes:
        lead: the leading sizes of the result; those of the operands are broadcast to them.
        orders: of the axes of left and right in memory; as they are named where there is none.
    """

    rows: int = 3
    depth: int = 5
    columns: int = 11
    lead: tuple[int, ...] = ()
    left_lead: tuple[int, ...] | None = None
    right_lead: tuple[int, ...] | None = None
    left_order: tuple[int, ...] | None = None
    right_order: tuple[int, ...] | None = None
    machine: Machine = field(default_factory=a_machine)
    followed: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        left, right = (self.lead if own is None else own for own in (self.left_lead, self.right_lead))
        return (*left, self.rows, self.depth), (*right, self.depth, self.columns)

    @property
    def orders(self) -> list[tuple[int, ...]]:
        both = zip(self.shapes, (self.left_order, self.right_order), strict=True)
        return [tuple(range(len(shape))) if order is None else order for shape, order in both]

    @property
    def result(self) -> tuple[int, ...]:
        return (*self.lead, self.rows, self.columns)

    def turned(self) -> Case:
        return replace(self, right_order=TURNED[len(self.shapes[1])])

    def lowered(self, free: Mapping[int, Any] | None = None, dtype: str = "float32") -> Any:
        """The kernel; `free` has the variables of the sizes that are free."""

        def sizes(shape: Sequence[int]) -> list[Any]:
            return [(free or {}).get(n, n) for n in shape]

        operands = []
        for name, shape, order in zip(("left", "right"), self.shapes, self.orders, strict=True):
            stored = sizes(shape)
            operands.append(operand(*(stored[axis] for axis in order), dtype=dtype, name=name))
        result = matmul(operands[0], self.orders[0], operands[1], self.orders[1], sizes(self.lead))
        if self.followed:
            bias, residual = operand(result.shape[-1], name="bias"), operand(*result.shape, name="residual")
            operands, result = [*operands, bias, residual], bias_residual_relu(result, bias, residual)
        return apply(matmul_kernel, self.machine, operands, result)

    def error(self, kernel: TypedLibrary, factor: float = 1.0) -> float:
        """The error of a kernel, whose left operand is multiplied by a factor."""
        left, right = (torch.randn(shape) for shape in self.shapes)
        expected: Tensor = (left.double() @ right.double()).expand(self.result)
        values = [x.permute(order) for x, order in zip((left * factor, right), self.orders, strict=True)]
        if self.followed:
            bias, residual = torch.randn(self.columns), torch.randn(self.result)
            values, expected = [*values, bias, residual], (expected + bias + residual).relu()
        return relative_error(kernel(values, self.result, torch.float32).double(), expected)


def check(cases: Sequence[Case]) -> None:
    """All cases in one library."""
    kernels = compiled_typed({f"kernel_{i}": case.lowered() for i, case in enumerate(cases)})
    errors = {str(case): case.error(kernel) for case, kernel in zip(cases, kernels.values(), strict=True)}
    assert all(error < LIMIT for error in errors.values()), {n: e for n, e in errors.items() if not e < LIMIT}


@pytest.mark.parametrize("is_turned", [False, True], ids=["plain", "turned"])
def test_counts_of_rows_columns_and_depths(is_turned: bool) -> None:
    """Up to, at and beyond the rows of a block, and the columns of whole vectors."""
    cases = [
        *(Case(rows=rows, columns=8) for rows in (1, 2, 7, 48, 49, 100)),
        *(Case(columns=columns) for columns in (9, 15, 16, 61)),
        *(Case(depth=depth) for depth in (1, 2, 33)),
        Case(columns=5, machine=a_machine(4)),
        Case(columns=37, machine=a_machine(16)),
    ]
    check([case.turned() if is_turned else case for case in cases])


def test_columns_are_divided_among_threads() -> None:
    cases = [Case(rows, columns=columns, machine=a_machine(threads=threads)) for rows, columns, threads in (
        (1, 8, 4), (1, 23, 2), (3, 40, 3), (3, 61, 4), (60, 24, 4)
    )]  # fmt: skip
    check([*cases, *(case.turned() for case in cases[1:4])])


def test_orders() -> None:
    """Every order of three axes on either side, and those that attention and heads bring about."""
    orders = list(itertools.permutations(range(3)))
    check([Case(lead=(2,), columns=9, left_order=order, right_order=orders[-1 - i]) for i, order in enumerate(orders)])
    check([Case(lead=(2,), columns=9, right_order=order) for order in orders[1:]])
    heads = [((0, 2, 1, 3), (0, 2, 1, 3)), ((0, 2, 1, 3), (0, 2, 3, 1)), ((3, 1, 0, 2), (2, 3, 1, 0))]
    check([Case(lead=(2, 3), left_order=left, right_order=right) for left, right in heads])
    check([Case(left_order=(1, 0)), Case(left_order=(1, 0), right_order=(1, 0))])


LEADS = [(2, 3), (1, 3), (2, 1), (1, 1), (3,), (1,), ()]


@pytest.mark.parametrize("is_turned", [False, True], ids=["plain", "turned"])
def test_leading_axes_are_broadcast(is_turned: bool) -> None:
    cases = [Case(lead=(2, 3), left_lead=lead) for lead in LEADS[1:]] if not is_turned else []
    cases += [Case(lead=(2, 3), right_lead=lead) for lead in LEADS[1:]]
    cases += [
        Case(lead=(2, 3), left_lead=(2, 1), right_lead=(3,)),
        Case(lead=(2, 3), left_lead=(3,), right_lead=(2, 1)),
        Case(lead=(1, 1), left_lead=(1,), right_lead=()),
        Case(lead=(2, 1, 2), left_lead=(1, 2), right_lead=(2, 1, 1)),
    ]
    check([case.turned() if is_turned and case.right_lead != (2, 1, 1) else case for case in cases])


def test_what_follows() -> None:
    usual = Case(lead=(2, 3), columns=19, followed=True)
    check([usual, usual.turned(), replace(usual, rows=50, lead=()), replace(usual, left_lead=(3,), right_lead=(2, 1))])


BATCH, ROWS, DEPTH = 90, 91, 92
"""Sizes that stand for free ones."""


@pytest.mark.parametrize("free", [(BATCH,), (ROWS,), (DEPTH,), (BATCH, ROWS, DEPTH)], ids=str)
def test_free_sizes(free: tuple[int, ...]) -> None:
    usual = {BATCH: 2, ROWS: 3, DEPTH: 5}
    calls = {BATCH: (1, 2, 5, 0), ROWS: (1, 2, 7, 48, 50, 0), DEPTH: (1, 5, 30, 0)}
    n, rows, depth = (number if number in free else one for number, one in usual.items())
    shape = Case(rows, depth, 19, (n, 3))
    cases = [shape, replace(shape, left_lead=(3,), right_lead=(n, 1), followed=True)]
    if DEPTH not in free:
        cases.append(replace(shape, right_order=(0, 2, 3, 1), machine=a_machine(threads=2)))
    variables = {number: size(f"n{number}") for number in free}
    kernels = compiled_typed({f"kernel_{i}": case.lowered(variables) for i, case in enumerate(cases)})
    for combination in itertools.product(*(calls[number] for number in free)):
        known = dict(zip(free, combination, strict=True))
        for case, kernel in zip(cases, kernels.values(), strict=True):
            assert _with(case, known).error(kernel) < LIMIT, (known, case)


def _with(case: Case, known: Mapping[int, int]) -> Case:
    def sizes(lead: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if lead is None else tuple(known.get(n, n) for n in lead)

    return replace(
        case,
        rows=known.get(case.rows, case.rows),
        depth=known.get(case.depth, case.depth),
        lead=sizes(case.lead) or (),
        left_lead=sizes(case.left_lead),
        right_lead=sizes(case.right_lead),
    )


@examples(5)
@given(
    lead=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(("both", "left", "right"))), max_size=2),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 50)),
    lanes=st.sampled_from((4, 8, 16)),
    threads=st.integers(1, 4),
    followed=st.booleans(),
    data=st.data(),
)
def test_any_product(
    lead: list[tuple[int, str]],
    sizes: tuple[int, int, int],
    lanes: int,
    threads: int,
    followed: bool,
    data: st.DataObject,
) -> None:
    left, right = (tuple(n if who in (side, "both") else 1 for n, who in lead) for side in ("left", "right"))
    orders = [tuple(data.draw(st.permutations(range(len(lead) + 2)))) for _ in range(2)]
    rows, depth, columns = sizes
    machine, whole = a_machine(lanes, threads), tuple(n for n, _ in lead)
    check([Case(rows, depth, lanes + columns, whole, left, right, orders[0], orders[1], machine, followed)])


def test_what_is_refused() -> None:
    """Fewer columns than lanes, a free number of columns, a turned operand of free depth."""
    assert Case(columns=8).lowered() is not None
    assert Case(columns=7).lowered() is None
    assert Case(columns=8, machine=a_machine(16)).lowered() is None
    assert Case(columns=64).lowered({64: size()}) is None
    assert Case(depth=64).turned().lowered() is not None
    assert Case(depth=64).turned().lowered({64: size()}) is None
    assert Case(depth=64).lowered({64: size()}) is not None


def test_only_float32_is_taken() -> None:
    for dtype, taken in (("float32", True), ("float64", False), ("float16", False), ("int32", False)):
        assert (Case().lowered(dtype=dtype) is not None) == taken, dtype


def test_a_matrix_times_itself_is_refused_or_right() -> None:
    x = operand(9, 9)
    kernel = apply(matmul_kernel, a_machine(), [x], matmul(x, (0, 1), x, (1, 0), ()))
    if kernel is not None:
        value = torch.randn(9, 9)
        ours = compiled({"kernel": kernel})["kernel"](value, shape=(9, 9))
        assert relative_error(ours.double(), value.double() @ value.double().T) < LIMIT


@pytest.mark.parametrize("first", ["left", "right"])
def test_operands_may_come_in_any_order(first: str) -> None:
    """A function may have its right operand as its first parameter."""
    left, right = operand(9, 9, name="left"), operand(9, 9, name="right")
    result = matmul(left, (0, 1), right, (0, 1), ())
    operands = [left, right] if first == "left" else [right, left]
    kernel = compiled({"kernel": apply(matmul_kernel, a_machine(), operands, result)})["kernel"]
    a, b = torch.randn(9, 9), torch.randn(9, 9)
    ours = kernel(*((a, b) if first == "left" else (b, a)), shape=(9, 9))
    assert relative_error(ours.double(), a.double() @ b.double()) < LIMIT


def test_what_follows_may_read_the_product_in_place_only() -> None:
    left, right = operand(8, 8, name="left"), operand(8, 8, name="right")
    result = matmul(left, (0, 1), right, (0, 1), ())
    for name, (element, taken) in {
        "in place": (lambda i, j: result(i, j) * 2, True),
        "in place, twice": (lambda i, j: result(i, j) * result(i, j), True),
        "beside an operand": (lambda i, j: result(i, j) + left(j, i), True),
        "turned": (lambda i, j: result(j, i), False),
        "the first row": (lambda i, j: result(i, j) - result(0, j), False),
        "moved": (lambda i, j: result(i, tirx.min(j + 1, 7)), False),
    }.items():
        last = te.compute((8, 8), element, name="last")
        assert (apply(matmul_kernel, a_machine(), [left, right], last) is not None) == taken, name


def test_one_percent_is_seen() -> None:
    cases = [Case(lead=(2,)), Case(lead=(2,)).turned(), Case(lead=(2,), followed=True)]
    kernels = compiled_typed({f"kernel_{i}": case.lowered() for i, case in enumerate(cases)})
    for case, kernel in zip(cases, kernels.values(), strict=True):
        assert case.error(kernel, factor=1.01) > 1e-3
