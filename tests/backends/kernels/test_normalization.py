"""Layer norm, RMS norm, softmax and its logarithm along rows of any width, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.normalization import normalization_kernel, softmax, standardized
from tests.backends.kernels.building import a_machine, apply, bias_residual_relu, examples, operand, size
from tests.backends.kernels.typed import TypedLibrary, compiled_typed
from tests.compare import relative_error

LIMIT = 2e-6
EPS = 1e-3


def layer_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


SPECIFICATIONS: dict[str, Callable[[te.Tensor], te.Tensor]] = {
    "layer_norm": lambda x: standardized(x, EPS, centred=True),
    "rms_norm": lambda x: standardized(x, EPS, centred=False),
    "softmax": softmax,
    "log_softmax": lambda x: softmax(x, log=True),
}
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
}
KINDS = list(SPECIFICATIONS)


@dataclass(frozen=True)
class Case:
    """A kind of normalization of a tensor along its last axis."""

    kind: str
    shape: tuple[int, ...]
    machine: Machine = field(default_factory=a_machine)
    followed: bool = False

    def lowered(self, free: Mapping[int, Any] | None = None) -> Any:
        """The kernel; `free` has the variables of axes whose size is free."""
        x = operand(*((free or {}).get(axis, n) for axis, n in enumerate(self.shape)))
        operands, result = [x], SPECIFICATIONS[self.kind](x)
        if self.followed:
            bias, residual = operand(x.shape[-1], name="bias"), operand(*x.shape, name="residual")
            operands, result = [x, bias, residual], bias_residual_relu(result, bias, residual)
        return apply(normalization_kernel, self.machine, operands, result)

    def error(self, kernel: TypedLibrary, x: Tensor | None = None, factor: float = 1.0) -> float:
        """The error of a kernel, whose operand is multiplied by a factor."""
        x = torch.randn(self.shape) * 3 if x is None else x
        values, expected = [x * factor], REFERENCES[self.kind](x.double())
        if self.followed:
            bias, residual = torch.randn(self.shape[-1]), torch.randn(self.shape)
            values, expected = [*values, bias, residual], (expected + bias + residual).relu()
        return relative_error(kernel(values, expected.shape, torch.float32).double(), expected)


def libraries(functions: Mapping[str, Any]) -> dict[str, TypedLibrary]:
    """Machine code of kernels, with exp as it is by default."""
    return compiled_typed(functions)


def both(case: Case) -> list[TypedLibrary]:
    """The kernel with exp in arithmetic, and with that of the C library."""
    function = case.lowered()
    return [*libraries({"kernel": function}).values(), *compiled_typed({"kernel": function}).values()]


def check(*cases: Case) -> None:
    """All cases in one library."""
    kernels = libraries({f"kernel_{i}": case.lowered() for i, case in enumerate(cases)})
    errors = {str(case): case.error(kernel) for case, kernel in zip(cases, kernels.values(), strict=True)}
    assert all(error < LIMIT for error in errors.values()), {n: e for n, e in errors.items() if not e < LIMIT}


@pytest.mark.parametrize("kind", KINDS)
def test_every_width(kind: str) -> None:
    """In turns: rows are added up and stored by the same code in all kinds."""
    first = 1 + KINDS.index(kind)
    check(*(Case(kind, (2, width)) for width in range(first, 71, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_widths_around_vectors_of_other_lanes(kind: str) -> None:
    """Up to four vectors are added side by side."""
    for lanes in (4, 16):
        widths = (lanes - 1, lanes, 3 * lanes + 1, 5 * lanes - 1, 8 * lanes)
        check(*(Case(kind, (3, width), a_machine(lanes)) for width in widths))


@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_and_work_large_enough_to_be_divided(kind: str) -> None:
    check(*(Case(kind, shape) for shape in ((1, 13), (2, 3, 13), (2, 1, 3, 1, 5), (300, 40), (1, 3000))))


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows(kind: str) -> None:
    check(*(Case(kind, shape, followed=True) for shape in ((3, 5), (2, 3, 8), (3, 37))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("free", [(0,), (0, 1), (2,), (0, 2)], ids=str)
def test_free_rows_and_free_widths(kind: str, free: tuple[int, ...]) -> None:
    calls = [(2, 3, 11), (1, 1, 1), (5, 2, 8), (1, 3, 7), (3, 4, 70), (0, 3, 11)]
    for followed in (False, True):
        case = Case(kind, (2, 3, 11), followed=followed)
        kernel = libraries({"kernel": case.lowered({axis: size(f"n{axis}") for axis in free})})["kernel"]
        for call in calls:
            shape = tuple(call[axis] if axis in free else n for axis, n in enumerate(case.shape))
            assert Case(kind, shape, followed=followed).error(kernel) < LIMIT, shape


@pytest.mark.parametrize("mean", [10.0, 1e3, -1e5])
def test_layer_norm_of_numbers_far_from_zero(mean: float) -> None:
    """The mean is off by a few units in its last place, and nothing else: squares of the numbers would cancel."""
    case = Case("layer_norm", (5, 67))
    x = torch.randn(case.shape) + mean
    (kernel,) = libraries({"kernel": case.lowered()}).values()
    assert case.error(kernel, x) < LIMIT + 4 * abs(mean) * 2**-24
    squares = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    naive = (x - x.mean(-1, keepdim=True)) / (squares.clamp(min=0) + EPS).sqrt()
    assert abs(mean) < 1e3 or relative_error(naive.double(), layer_norm(x.double())) > 4 * abs(mean) * 2**-24


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_the_number_added_to_the_variance_counts(kind: str) -> None:
    case = Case(kind, (4, 19))
    (kernel,) = libraries({"kernel": case.lowered()}).values()
    for x in (torch.zeros(4, 19), torch.randn(4, 19) * 1e-2, torch.full((4, 19), 3.0), torch.randn(4, 19) * 1e-20):
        assert case.error(kernel, x) < LIMIT


@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
def test_infinities_nan_and_numbers_beyond_the_reach_of_exp(kind: str) -> None:
    for width in (5, 8, 21, 64):
        case = Case(kind, (9, width))
        x = torch.randn(case.shape)
        x[0, 2] = x[1, :-1] = x[2] = x[3, ::2] = -math.inf
        x[4, 3], x[5, 0] = math.inf, math.nan
        x[6], x[7] = x[6] * 1e4, x[7] * 0.01
        expected = REFERENCES[kind](x.double())
        assert expected[[2, 4, 5]].isnan().all() and not expected[[0, 1, 3, 6, 7, 8]].isnan().any()
        for kernel in both(case):
            ours = kernel([x], case.shape, torch.float32)
            for row in range(9):
                one, other = ours[row].double(), expected[row]
                small = other < 1e-37 if kind == "softmax" else other == math.inf
                assert relative_error(one[~small], other[~small]) < LIMIT, row
                assert (one[small] <= 1e-37).all(), row


@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
def test_softmax_of_numbers_far_from_zero(kind: str) -> None:
    """The largest is subtracted first, which is exact: a distance from zero costs no digits."""
    case = Case(kind, (5, 21))
    (kernel,) = libraries({"kernel": case.lowered()}).values()
    for distance in (1e3, -1e5):
        assert case.error(kernel, torch.randn(case.shape) + distance) < LIMIT


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_nan_stays_in_its_row(kind: str) -> None:
    for width in (5, 21):
        case = Case(kind, (4, width))
        x = torch.randn(case.shape)
        x[1, 3], x[3, 0] = math.nan, math.nan
        (kernel,) = libraries({"kernel": case.lowered()}).values()
        assert case.error(kernel, x) < LIMIT
        assert kernel([x], case.shape, torch.float32).isnan().any(-1).tolist() == [False, True, False, True]


@examples(3)
@given(
    kind=st.sampled_from(KINDS),
    lead=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 100),
    lanes=st.sampled_from((4, 8, 16)),
    followed=st.booleans(),
    free=st.sets(st.integers(0, 3)),
)
def test_any_row(kind: str, lead: list[int], width: int, lanes: int, followed: bool, free: set[int]) -> None:
    case = Case(kind, (2, *lead, width), a_machine(lanes, threads=2), followed)
    kernel = libraries({"kernel": case.lowered({axis: size(f"n{axis}") for axis in free})})["kernel"]
    assert case.error(kernel) < LIMIT


def test_what_follows_may_read_the_result_in_place_only() -> None:
    x, other = operand(8, 8), operand(8, 8, name="other")
    for kind, specification in SPECIFICATIONS.items():
        result = specification(x)
        follows: dict[str, tuple[Callable[..., Any], bool]] = {
            "in place": (lambda r, i, j: r(i, j) * 2, True),
            "another tensor turned": (lambda r, i, j: r(i, j) + other(j, i), True),
            "turned": (lambda r, i, j: r(j, i), False),
            "moved": (lambda r, i, j: r(i, tirx.min(j + 1, 7)), False),
        }
        for name, (element, taken) in follows.items():
            last = te.compute((8, 8), partial(element, result), name="last")
            kernel = apply(normalization_kernel, a_machine(), [x, other], last)
            assert (kernel is not None) == taken, (kind, name)


def test_what_follows_may_read_the_operand_too() -> None:
    x = operand(3, 21)
    result = softmax(x)
    last = te.compute((3, 21), lambda i, j: result(i, j) * x(i, j), name="last")
    kernel = libraries({"kernel": apply(normalization_kernel, a_machine(), [x], last)})["kernel"]
    value = torch.randn(3, 21)
    ours = kernel([value], (3, 21), torch.float32)
    assert relative_error(ours.double(), value.double().softmax(-1) * value.double()) < LIMIT


def test_other_kernels_are_refused() -> None:
    x = operand(3, 8)
    k = te.reduce_axis((0, 8), "k")
    for mark in ("reduction", "product", "attention"):
        total = te.compute((3,), lambda i: te.sum(x(i, k), axis=[k]), name="sum", attrs={"graphopt.kernel": mark})
        assert apply(normalization_kernel, a_machine(), [x], total) is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_percent_is_seen(kind: str) -> None:
    """A result that is one percent off; an operand too, where the kind does not divide by its scale."""
    case = Case(kind, (3, 21))
    kernel = libraries({"kernel": case.lowered()})["kernel"]
    x = torch.randn(case.shape)
    ours = kernel([x], case.shape, torch.float32).double()
    assert relative_error(ours * 1.01, REFERENCES[kind](x.double())) > 1e-3
    if "softmax" in kind:
        assert case.error(kernel, factor=1.01) > 1e-3
    else:
        assert case.error(kernel, x * 0.05, factor=1.01) > 1e-3
