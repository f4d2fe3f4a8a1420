"""What of a factorisation is in memory at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.passes import _covariance, _factor_problem
from graphopt.passes._covariance import Moments
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._factor_problem import product, squares
from graphopt.rewriter import Rewriter

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_factor_problem, "_AT_A_TIME", 12)


@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.tuples(*[st.integers(0, 7)] * 3), st.booleans(), st.booleans()
)
def test_products_of_any_dtypes_are_those_of_float64(
    left: torch.dtype, right: torch.dtype, sizes: tuple[int, int, int], across: bool, parts: bool
) -> None:
    m, k, n = sizes
    outer = (2,) if parts else ()
    a = torch.randn(*outer, m, k, dtype=torch.float64).to(left)
    b = torch.randn(*outer, *((n, k) if across else (k, n)), dtype=torch.float64).to(right)
    b = b.transpose(-1, -2) if across else b
    made = product(a, b)
    assert made.dtype is torch.float64 and made.shape == (*outer, m, n)
    assert torch.allclose(made, a.double() @ b.double(), rtol=1e-12, atol=1e-12)


@given(st.sampled_from(DTYPES), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_squares_of_rows(dtype: torch.dtype, rows: int, columns: int, metric: bool) -> None:
    r = torch.randn(2, rows, columns, dtype=torch.float64).to(dtype)
    c = torch.randn(columns, columns, dtype=torch.float64) if metric else None
    expected = torch.einsum("grc,cd,grd->gr", r.double(), torch.eye(columns).double() if c is None else c, r.double())
    assert torch.allclose(squares(r, c), expected, rtol=1e-12, atol=1e-12)


def a_model(folder: Path) -> go.Model:
    """Of layers of one size, whose weights are on disk."""
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())]).eval()
    go.capture(net, (torch.randn(4, 16),)).save(folder / "net.gopt")
    return go.load(folder / "net.gopt", mapped=True)


def test_moments_are_gone_before_the_next_ones_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alive: list[int] = []
    known: list[weakref.ref[Tensor]] = []
    made = Moments.__init__

    def counted(self: Moments, whole: Whole) -> None:
        alive.append(sum(one() is not None for one in known))
        made(self, whole)
        known.append(weakref.ref(self.sum))

    monkeypatch.setattr(Moments, "__init__", counted)
    calib = [(torch.randn(4, 16),) for _ in range(8)]
    go.run(a_model(tmp_path), "low-rank{params=0.7,solver=activation,refit=false}", calib=calib, check=False)
    assert len(alive) >= 8, "four layers, for the table and for the factors"
    assert max(alive) == 0


def test_sums_of_moments_take_no_copy_of_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = a_model(tmp_path)
    _, whole = next(iter(find_layers(Rewriter(model))))
    assert isinstance(whole, Whole) and whole.kernel.weight.device.type == "meta", "no weight is read to find layers"
    moments, x = Moments(whole), torch.randn(3, 5, 16)
    place = moments.sum.data_ptr()
    monkeypatch.setattr(_covariance, "_BYTES", 8 * 16 * 2)
    moments.add(x)
    rows: Any = x.reshape(-1, 16).double()
    assert torch.allclose(moments.sum[0], rows.T @ rows) and moments.sum.data_ptr() == place and moments.count == 15
