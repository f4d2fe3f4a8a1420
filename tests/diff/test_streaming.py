"""The distance of two tensors read in pieces, against the same in one go and in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.diff import streaming
from graphopt.diff.streaming import distance

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64)
PIECE, ROW = streaming._PIECE, streaming._ROW


def of(dtype: torch.dtype, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (size,), generator=generator).to(dtype)


@pytest.mark.parametrize("size", [1, ROW - 1, ROW + 1, PIECE // 2 + 1, PIECE, 2 * PIECE + 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_that_of_one_pass_in_double_precision(dtype: torch.dtype, size: int) -> None:
    a = of(dtype, size, 0)
    b = a.clone()
    b[size // 2 :] = of(dtype, size - size // 2, 1)
    found = distance(a, b)
    if torch.equal(a, b):
        assert found is None
        return
    assert found is not None
    x, y = (torch.view_as_real(t).double().reshape(-1) if t.is_complex() else t.double() for t in (a, b))
    wanted = (x @ x, y @ y, x @ y, (x - y) @ (x - y), (x - y).abs().max())
    scale = float(x @ x + y @ y)
    for value, reference in zip(
        (found.squared_a, found.squared_b, found.inner, found.squared), wanted[:4], strict=True
    ):
        assert abs(value - float(reference)) <= 1e-6 * scale
    assert math.isclose(found.largest, float(wanted[4]), rel_tol=1e-6)
    assert found.differing == int((x != y).sum())


def test_pieces_that_are_equal_count_for_the_norm() -> None:
    a = of(torch.float32, 3 * PIECE, 0)
    b = a.clone()
    b[-1] += 1
    found = distance(a, b)
    assert found is not None and found.differing == 1 and math.isclose(found.largest, 1.0, rel_tol=1e-6)
    assert math.isclose(found.norm_a, float(a.double().norm()), rel_tol=1e-6)
    assert math.isclose(found.relative, 1 / max(found.norm_a, found.norm_b), rel_tol=1e-6)
    assert distance(a, a.clone()) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    a = of(torch.float32, 2 * PIECE, 0)
    for place in (0, PIECE + 3):
        b = a.clone()
        b[place] = value
        found = distance(a, b)
        assert found is not None and found.relative == math.inf and found.differing == 1
        assert math.isnan(found.largest) or found.largest == math.inf
