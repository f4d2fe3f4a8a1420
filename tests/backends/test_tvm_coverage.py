"""Which rule wrote each function of a compiled model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.kernels.coverage import GENERAL, Coverage
from graphopt.errors import UsageError


class Sums(nn.Module):
    """A linear layer, which has a kernel, and a running sum, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).cumsum(1)


def test_every_function_is_named_once() -> None:
    artifact = go.build(go.capture(Sums().eval(), (torch.randn(2, 32),)), threads=1)
    assert isinstance(artifact, TvmArtifact)
    coverage = artifact.coverage
    (linear,) = coverage.rules["product"]
    assert "linear" in linear
    assert coverage.general == ("cumsum",)


def test_rules_are_grouped() -> None:
    coverage = Coverage.of({"b": "product", "a": "product", "c": GENERAL, "d": "winograd"})
    assert coverage == Coverage({"product": ("a", "b"), "winograd": ("d",)}, ("c",))
    assert coverage.to_json() == {"rules": {"product": ["a", "b"], "winograd": ["d"]}, "general": ["c"]}


def test_a_loaded_artifact_does_not_know(tmp_path: object) -> None:
    from graphopt.backend import load_artifact

    artifact = go.build(go.capture(nn.Linear(3, 2), (torch.randn(1, 3),)), threads=1)
    artifact.save(f"{tmp_path}/bundle")
    loaded = load_artifact(f"{tmp_path}/bundle")
    assert isinstance(loaded, TvmArtifact)
    with pytest.raises(UsageError, match="was loaded from a folder"):
        _ = loaded.coverage
