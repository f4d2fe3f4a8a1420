"""Layers whose intermediate result nothing else reads become one kernel; others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backends.tvm.artifact import TvmArtifact
from tests.compare import relative_error


class Block(nn.Module):
    """An inverted residual block of MobileNetV2."""

    def __init__(self, inputs: int = 16, channels: int = 96, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, channels, 1)
        self.spread = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)
        self.project = nn.Conv2d(channels, inputs, 1)

    def wide(self, x: Tensor) -> Tensor:
        return F.relu6(self.expand(x))

    def narrow(self, wide: Tensor) -> Tensor:
        return self.project(F.relu6(self.spread(wide)))

    def forward(self, x: Tensor) -> Any:
        return x + self.narrow(self.wide(x))


class ReadTwice(Block):
    def forward(self, x: Tensor) -> Any:
        wide = self.wide(x)
        return self.narrow(wide) + wide.mean()


class Returned(Block):
    def forward(self, x: Tensor) -> Any:
        wide = self.wide(x)
        return self.narrow(wide), wide


class Residual(Block):
    """The expanded image is read by the second convolution and by what follows it."""

    def forward(self, x: Tensor) -> Any:
        wide = self.wide(x)
        return self.project(F.relu6(self.spread(wide)) + wide)


class Added(Block):
    """The same, where the addition is fused into the function of the convolution."""

    def forward(self, x: Tensor) -> Any:
        wide = self.expand(x)
        return self.project(self.spread(wide) + wide)


def built(net: nn.Module, x: Tensor, **options: Any) -> TvmArtifact:
    artifact = go.build(go.capture(net.eval(), (x,), **options), threads=2)
    assert isinstance(artifact, TvmArtifact)
    return artifact


def error(net: nn.Module, artifact: TvmArtifact, x: Tensor) -> float:
    ours, theirs = artifact(x), net(x)
    if isinstance(theirs, Tensor):
        return relative_error(ours, theirs)
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def test_blocks_of_the_same_shape_share_a_kernel() -> None:
    net, x = nn.Sequential(Block(), Block()), torch.randn(1, 16, 28, 28)
    artifact = built(net, x)
    assert len(artifact.coverage.rules["expanded"]) == 1
    assert "depthwise" not in artifact.coverage.rules
    assert not artifact.coverage.general
    assert error(net, artifact, x) < 1e-6


def test_one_library_for_any_number_of_images() -> None:
    net, x = Block(24, 144), torch.randn(2, 24, 20, 20)
    artifact = built(net, x, dynamic={0: {0: "batch"}})
    assert "expanded" in artifact.coverage.rules
    for images in (1, 2, 5):
        assert error(net, artifact, torch.randn(images, 24, 20, 20)) < 1e-6


@pytest.mark.parametrize("kind", [ReadTwice, Returned, Residual, Added])
def test_what_others_read_stays(kind: type[Block]) -> None:
    net, x = kind(), torch.randn(1, 16, 28, 28)
    artifact = built(net, x)
    assert "expanded" not in artifact.coverage.rules and "depthwise" in artifact.coverage.rules
    assert error(net, artifact, x) < 1e-6


def test_the_same_function_twice_in_a_row() -> None:
    """Its variables cannot be defined twice in one function."""
    net, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.AdaptiveAvgPool1d(32)), torch.randn(4, 32)
    artifact = built(net, x, dynamic={0: {0: "batch"}})
    assert error(net, artifact, torch.randn(7, 32)) < 1e-6


def test_exact_code_has_it_too() -> None:
    """Nothing is computed differently."""
    net, x = Block(), torch.randn(1, 16, 28, 28)
    artifact = go.build(go.capture(net.eval(), (x,)), threads=1, exact_float=True)
    assert isinstance(artifact, TvmArtifact) and "expanded" in artifact.coverage.rules
    assert error(net, artifact, x) < 1e-6
