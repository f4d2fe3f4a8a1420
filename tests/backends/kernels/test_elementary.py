"""exp, sigmoid, tanh and erf in plain arithmetic against float64, over all magnitudes of float32, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.elementary import depends_on_condition, in_arithmetic, in_library
from graphopt.backends.tvm.schedule import ELEMENTARY, schedule_function
from tests.backends.kernels.building import Library, compiled, examples, operand, size

CLAIMS = {"exp": 2e-7, "sigmoid": 3e-7, "tanh": 4e-7, "erf": 4e-7}
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
}
FUNCTIONS = {"exp": tirx.exp, "sigmoid": tirx.sigmoid, "tanh": tirx.tanh, "erf": tirx.erf}

SMALLEST_NORMAL = 2.0**-126
SMALLEST = 2.0**-149
EXP_END = -86.9
"""Below, exp is 0 sooner or later, though its last values are normal numbers."""

EXP_LEFT = 1.8e-38
"""What exp is less than there."""

EXP_OVERFLOW = 88.72283
"""exp is finite up to here, just below the logarithm of the largest number."""


def _each(function: Callable[[Any], Any], x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: function(x(*i)), name="y")


@cache
def kernels() -> dict[str, Library]:
    """Each function in vectors, and, as `scalar_*`, one number at a time."""
    functions: dict[str, Any] = {}
    for name, function in FUNCTIONS.items():
        for kind in ("", "scalar_"):
            x = operand(size())
            y = _each(function, x)
            code = te.create_prim_func([x, y], "int64")
            if not kind:
                x = operand(size(), 64)
                y = _each(function, x)
                code = schedule_function(
                    te.create_prim_func([x, y], "int64"), [f"{known}:float32" for known in ELEMENTARY]
                )
            functions[f"{kind}{name}"] = code
    return compiled(functions)


def computed(name: str, x: Tensor) -> Tensor:
    """A function in vectors of any number of arguments."""
    rows = -(-x.numel() // 64)
    filled = torch.zeros(rows * 64)
    filled[: x.numel()] = x
    return kernels()[name](filled.view(rows, 64), shape=(rows, 64)).flatten()[: x.numel()]


def one_by_one(name: str, x: Tensor) -> Tensor:
    return kernels()[f"scalar_{name}"](x, shape=x.shape)


def all_magnitudes() -> Tensor:
    """Both signs, every exponent (the subnormal numbers' too), 1024 fractions each; and dense where results change."""
    steps = np.arange(0, 0x7F800000, 1 << 13, dtype=np.int64)
    bits = np.concatenate([steps, steps + 1, steps + (1 << 13) - 1]).astype(np.int32)
    numbers = torch.from_numpy(bits.view(np.float32))
    dense = torch.linspace(0, 110, 1_000_003)
    fine = torch.linspace(0, 4, 500_009)
    both = torch.cat([numbers, dense, fine])
    return torch.cat([both, -both])


def errors(name: str, x: Tensor, ours: Tensor) -> Tensor:
    """Errors relative to the result, or to the smallest normal number where the result is less.

    A result below the smallest normal number has fewer digits.
    """
    expected = REFERENCES[name](x.double())
    finite = expected.abs() <= torch.finfo(torch.float32).max
    difference = (ours.double() - expected).abs() / expected.abs().clamp(min=SMALLEST_NORMAL)
    return torch.where(finite, difference, torch.zeros_like(difference))


def worst(name: str, x: Tensor, ours: Tensor) -> str:
    found = errors(name, x, ours)
    at = int(found.argmax())
    return f"{name}({float(x[at])!r}) is {float(ours[at])!r}, wrong by {float(found[at]):.2e}"


def _claimed(name: str, x: Tensor) -> Tensor:
    """The arguments for which an error is claimed."""
    if name == "exp":
        return x[(x >= EXP_END) & (x <= EXP_OVERFLOW)]
    return x[x >= EXP_END] if name == "sigmoid" else x


@pytest.mark.parametrize("name", CLAIMS)
def test_no_error_is_larger_than_claimed(name: str) -> None:
    x = _claimed(name, all_magnitudes())
    ours = computed(name, x)
    assert float(errors(name, x, ours).max()) <= CLAIMS[name], worst(name, x, ours)


@pytest.mark.parametrize("name", CLAIMS)
def test_single_numbers_are_as_exact_as_vectors(name: str) -> None:
    x = _claimed(name, all_magnitudes()[::97])
    ours = one_by_one(name, x)
    assert float(errors(name, x, ours).max()) <= CLAIMS[name], worst(name, x, ours)


@pytest.mark.parametrize("name", CLAIMS)
@examples(30)
@given(x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70))
def test_any_numbers(name: str, x: list[float]) -> None:
    values = _claimed(name, torch.tensor(x))
    if len(values):
        assert float(errors(name, values, computed(name, values)).max()) <= CLAIMS[name]


@pytest.mark.parametrize("name", CLAIMS)
def test_nan_gives_nan_and_nothing_else_does(name: str) -> None:
    odd = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001, 0xFFFFFFFF], dtype=np.uint32)
    for function in (computed, one_by_one):
        assert bool(function(name, torch.from_numpy(odd.view(np.float32))).isnan().all())
    assert not bool(computed(name, all_magnitudes()).isnan().any())


@pytest.mark.parametrize(
    ("name", "low", "high"), [("exp", 0.0, math.inf), ("sigmoid", 0.0, 1.0), ("tanh", -1.0, 1.0), ("erf", -1.0, 1.0)]
)
def test_infinities_and_the_largest_numbers_give_the_limits(name: str, low: float, high: float) -> None:
    for function in (computed, one_by_one):
        for far in (math.inf, torch.finfo(torch.float32).max, 1e30, 1e19, 200.0):
            assert function(name, torch.tensor([far, -far])).tolist() == [high, low], far


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_odd_functions_keep_the_sign_of_zero_and_of_every_number(name: str) -> None:
    for function in (computed, one_by_one):
        zeros = function(name, torch.tensor([0.0, -0.0]))
        assert zeros.tolist() == [0.0, 0.0]
        assert torch.signbit(zeros).tolist() == [False, True]
    x = all_magnitudes().abs()
    assert torch.equal(computed(name, -x), -computed(name, x))
    assert bool((computed(name, x) <= 1).all())


@pytest.mark.parametrize(("name", "value"), [("exp", 1.0), ("sigmoid", 0.5)])
def test_signed_zeros_and_subnormal_numbers_are_zero_to_exp_and_sigmoid(name: str, value: float) -> None:
    x = torch.tensor([0.0, -0.0, SMALLEST, -SMALLEST, SMALLEST_NORMAL, -SMALLEST_NORMAL, 1e-40, -1e-40])
    for function in (computed, one_by_one):
        assert function(name, x).tolist() == [value] * len(x)


@pytest.mark.parametrize(("name", "slope"), [("tanh", 1.0), ("erf", 2 / math.sqrt(math.pi))])
def test_subnormal_numbers_are_not_lost(name: str, slope: float) -> None:
    """Within one of the steps in which subnormal numbers are counted."""
    steps = torch.cat([torch.arange(1, 2000), torch.arange(2000, 1 << 23, 997)]).to(torch.int32)
    x = steps.view(torch.float32)
    for function in (computed, one_by_one):
        assert float((function(name, x).double() - slope * x.double()).abs().max()) <= 1.01 * SMALLEST


def test_exp_gives_up_below_and_is_never_negative() -> None:
    assert bool((computed("exp", torch.linspace(-87.7, -200, 10_001)) == 0).all())
    last = torch.linspace(EXP_END, -87.7, 100_001)
    for function in (computed, one_by_one):
        ours = function("exp", last)
        assert bool((ours >= 0).all())
        assert float((ours.double() - last.double().exp()).abs().max()) <= EXP_LEFT
    assert float(computed("exp", torch.tensor([EXP_END]))) > SMALLEST_NORMAL


def test_exp_is_finite_wherever_its_result_is_and_infinite_beyond() -> None:
    x = torch.linspace(88.5, EXP_OVERFLOW, 100_001)
    assert float(x.double().exp().max()) < torch.finfo(torch.float32).max
    ours = computed("exp", x)
    assert float(errors("exp", x, ours).max()) <= CLAIMS["exp"], worst("exp", x, ours)
    above = torch.linspace(88.72285, 89.5, 10_001)
    assert float(above.double().exp().min()) > torch.finfo(torch.float32).max
    assert bool((computed("exp", above) == math.inf).all())


def test_sigmoid_far_to_the_left_is_small_and_not_negative() -> None:
    x = torch.linspace(-80, -120, 10_001)
    ours = computed("sigmoid", x)
    assert bool((ours >= 0).all())
    assert float((ours.double() - x.double().sigmoid()).abs().max()) <= SMALLEST_NORMAL


def test_the_pieces_of_tanh_and_erf_meet() -> None:
    for name, seam in (("tanh", 0.63), ("erf", 1.0)):
        x = torch.linspace(seam - 1e-4, seam + 1e-4, 20_001)
        assert float(errors(name, x, computed(name, x)).max()) <= CLAIMS[name], name


def _calls(body: Any, name: str) -> bool:
    return f"T.{name}(" in str(body)


def test_only_float32_is_written_out() -> None:
    for name, function in FUNCTIONS.items():
        for dtype, written in (("float32", True), ("float64", False), ("float16", False)):
            x = operand(8, dtype=dtype)
            body = te.create_prim_func([x, _each(function, x)], "int64").body
            assert _calls(body, name)
            assert _calls(in_arithmetic(body), name) != written, (name, dtype)


def test_other_functions_are_left_alone() -> None:
    for name, function in (("log", tirx.log), ("sqrt", tirx.sqrt), ("cos", tirx.cos)):
        x = operand(8)
        body = te.create_prim_func([x, _each(function, x)], "int64").body
        assert _calls(in_arithmetic(body), name), name


def _within(x: Any) -> Any:
    return tirx.tanh(x * x + 1.0) + tirx.erf(x) * tirx.exp(x)


def _of_one_another(x: Any) -> Any:
    return tirx.tanh(tirx.exp(x) * x) + tirx.erf(tirx.sigmoid(x) * tirx.tanh(tirx.sigmoid(x) - 0.5))


def _expected(x: Tensor) -> tuple[Tensor, Tensor]:
    v = x.double()
    nested = torch.tanh(v.exp() * v) + torch.erf(v.sigmoid() * torch.tanh(v.sigmoid() - 0.5))
    return torch.tanh(v * v + 1) + torch.erf(v) * v.exp(), nested


def _in_vectors(function: Callable[[Any], Any]) -> Any:
    x = operand(4, 64)
    return schedule_function(
        te.create_prim_func([x, _each(function, x)], "int64"), [f"{known}:float32" for known in ELEMENTARY]
    )


@pytest.mark.parametrize("kind", ["vectors", "single", "library"])
def test_what_is_around_and_within_them_is_right(kind: str) -> None:
    """And functions of functions, which once took TVM minutes."""
    functions = {}
    for name, function in (("within", _within), ("of_one_another", _of_one_another)):
        x = operand(4, 64)
        plain = te.create_prim_func([x, _each(function, x)], "int64")
        ways = {"vectors": _in_vectors(function), "single": plain, "library": plain.with_body(in_library(plain.body))}
        functions[name] = ways[kind]
    built, values = compiled(functions), torch.randn(4, 64)
    for library, expected in zip(built.values(), _expected(values), strict=True):
        assert float((library(values, shape=(4, 64)).double() - expected).abs().max()) < 1e-5


def test_what_is_applied_under_a_condition_is_told_apart() -> None:
    x = operand(8)
    zero = tirx.const(0, "float32")
    inner, outer, chosen = (
        te.create_prim_func([x, te.compute((10,), element)], "int64").body
        for element in (
            lambda i: tirx.if_then_else(tirx.all(i >= 1, i < 9), tirx.exp(x(i - 1)), zero),
            lambda i: tirx.exp(tirx.if_then_else(tirx.all(i >= 1, i < 9), x(i - 1), zero)),
            lambda i: tirx.Select(i < 5, tirx.exp(x(tirx.min(i, 7))), zero),
        )
    )
    assert depends_on_condition(inner)
    assert not depends_on_condition(outer)
    assert not depends_on_condition(chosen)


@pytest.mark.parametrize("name", CLAIMS)
def test_one_percent_is_seen(name: str) -> None:
    """An argument wrong by one percent, and even a result wrong by one part in a million, is more than is claimed."""
    x = torch.linspace(-2, 2, 1001)
    assert float(errors(name, x, computed(name, x * 1.01)).max()) > 1e-3
    assert float(errors(name, x, computed(name, x) * (1 + 1e-6)).max()) > CLAIMS[name]
