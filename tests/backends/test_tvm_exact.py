"""Exact floating point: no Winograd convolution and no polynomials, and how far off these are otherwise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backend import get_backend, load_artifact
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.errors import UsageError
from tests.compare import relative_error


class Net(nn.Module):
    """A convolution that Winograd's is chosen for, and the elementary functions behind it and by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)
        z = self.head(y.mean((2, 3)))
        return [y, F.gelu(y), F.silu(y), y.tanh(), z.exp(), F.gelu(z), z.sigmoid(), z.tanh(), z.softmax(-1)]


def _net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().eval().to(dtype), torch.randn(1, 64, 28, 28).to(dtype)


def _built(*, exact: bool, net: nn.Module, x: Tensor) -> TvmArtifact:
    artifact = go.build(go.capture(net, (x,)), threads=1, exact_float=exact)
    assert isinstance(artifact, TvmArtifact)
    return artifact


def test_exact_code_has_no_winograd_kernel_and_equals_eager() -> None:
    net, x = _net()
    artifact = _built(exact=True, net=net, x=x)
    assert "winograd" not in artifact.coverage.rules and "convolution" in artifact.coverage.rules
    assert relative_error(artifact(x), net(x)) < 2e-6


def test_strassens_product_is_not_exact() -> None:
    net, x = nn.Linear(768, 1536), torch.randn(196, 768)
    exact, fast = (_built(exact=exact, net=net, x=x) for exact in (True, False))
    assert "strassen" in fast.coverage.rules and "strassen" not in exact.coverage.rules
    reference = net.double()(x.double())
    assert relative_error(exact(x).double(), reference) < 2e-6
    assert relative_error(fast(x).double(), reference) < 3e-6


def test_inexact_code_has_one_and_stays_within_its_bound() -> None:
    net, x = _net()
    artifact = _built(exact=False, net=net, x=x)
    assert "winograd" in artifact.coverage.rules
    assert relative_error(artifact(x)[0].double(), net.double()(x.double())[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
def test_exact_code_holds_no_arithmetic_for_elementary_functions(
    dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in explicit vectors (softmax, attention) and those of bfloat16 included."""
    from graphopt.backends.tvm import pipeline

    changed: list[bool] = []

    def watched(code: object) -> object:
        written = pipeline_in_arithmetic(code)
        changed.append(str(written) != str(code))
        return written

    pipeline_in_arithmetic = pipeline.in_arithmetic
    monkeypatch.setattr(pipeline, "in_arithmetic", watched)
    net, x = _net(dtype)
    _built(exact=exact, net=net, x=x)
    assert any(changed) != exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_under_a_condition_is_not_computed_before_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros around exp(x): beyond the border there is no x to be read."""
    from graphopt.backends.tvm import pipeline

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x.exp(), (3, 3, 2, 2))

    seen: list[object] = []
    monkeypatch.setattr(pipeline, "in_arithmetic", lambda code: seen.append(code) or code)
    x = torch.randn(2, 3, 5, 6, dtype=dtype)
    artifact = go.build(go.capture(Padded(), (x,)), threads=1)
    assert not any("exp(" in str(code) for code in seen)
    assert relative_error(artifact(x), Padded()(x)) < 1e-6


def test_exact_functions_are_right_near_zero_and_at_the_ends() -> None:
    class Functions(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x.exp(), x.sigmoid(), x.tanh(), x.erf()]

    ends = [0.0, 1e-30, 1e-6, 88.0, -88.0, -100.0, math.inf, -math.inf]
    x = torch.cat([torch.tensor(ends), torch.linspace(-9, 9, 1000)])
    artifact = _built(exact=True, net=Functions(), x=x)
    for ours, right in zip(artifact(x), Functions()(x.double()), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=3e-7, atol=1e-40)


def test_double_precision_stays_double() -> None:
    net, x = _net(torch.float64)
    assert relative_error(_built(exact=True, net=net, x=x)(x), net(x)) < 1e-14


def test_a_bundle_remembers_that_it_is_exact(tmp_path: Path) -> None:
    net, x = nn.Linear(3, 2).eval(), torch.randn(1, 3)
    for exact in (False, True):
        _built(exact=exact, net=net, x=x).save(tmp_path / str(exact))
        loaded = load_artifact(tmp_path / str(exact))
        assert isinstance(loaded, TvmArtifact) and loaded.exact_float is exact


def test_other_backends_are_exact_anyway_or_refuse() -> None:
    net, x = nn.Linear(3, 2).eval(), torch.randn(1, 3)
    model = go.capture(net, (x,))
    assert relative_error(go.build(model, backend="reference", threads=1, exact_float=True)(x), net(x)) == 0
    with pytest.raises(UsageError, match="'onnxruntime' does not know exact floating point"):
        go.build(model, backend="onnxruntime", threads=1, exact_float=True)
    assert [get_backend(name).exact_float for name in ("tvm", "reference", "onnxruntime")] == [
        *("option", "always", "never")
    ]
