"""Zeros around an image are part of the convolution that reads them, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backends.tvm.artifact import TvmArtifact
from tests.compare import relative_error


class Convolved(nn.Module):
    """A convolution of `function(x)`."""

    def __init__(self, function: object, conv: nn.Module) -> None:
        super().__init__()
        self.function, self.conv = function, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(x))


def _pads_left(net: nn.Module, x: Tensor, limit: float = 1e-6) -> int:
    """How many functions of the compiled net write a padded image; it computes what the net does, at two sizes."""
    artifact = go.build(go.capture(net, (x,), dynamic={"x": {0: "batch"}}), threads=1)
    assert isinstance(artifact, TvmArtifact)
    for batch in (1, 3):
        given_x = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            assert relative_error(artifact(given_x), net(given_x)) < limit
    functions = [*(name for names in artifact.coverage.rules.values() for name in names), *artifact.coverage.general]
    return sum("pad" in name for name in functions)


KINDS = {
    "direct": nn.Conv2d(4, 8, 3, stride=2),
    "winograd": nn.Conv2d(16, 16, 3, padding=1),
    "depthwise": nn.Conv2d(4, 4, 3, stride=2, groups=4),
    "grouped": nn.Conv2d(4, 8, 5, groups=2),
    "pointwise": nn.Conv2d(4, 8, 1),
    "dilated": nn.Conv2d(4, 8, 3, dilation=2, padding=(1, 0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_look_over_the_border(kind: str) -> None:
    conv = KINDS[kind]
    assert isinstance(conv, nn.Conv2d)
    net = Convolved(lambda x: F.pad(F.relu(x), (0, 1, 2, 3)), conv)
    assert _pads_left(net, torch.randn(2, conv.in_channels, 20, 17), 1e-5 if kind == "winograd" else 1e-6) == 0


@given(
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    own=st.integers(0, 1),
    groups=st.sampled_from((1, 8)),
    size=st.tuples(st.integers(4, 19), st.integers(4, 19)),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_zeros(pads: list[int], kernel: int, stride: int, own: int, groups: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(8, 8, kernel, stride, padding=min(own, kernel // 2), groups=groups)
    assert _pads_left(Convolved(lambda x: F.pad(x, pads), conv), torch.randn(2, 8, *size)) == 0


NEARLY = {
    "ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "a cut": lambda x: F.pad(x, (-1, 1, 1, 1)),
    "the border again": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "channels": lambda x: F.pad(x, (1, 1, 1, 1, 0, 1)),
    "something in between": lambda x: F.pad(x, (1, 1, 1, 1)).exp(),
}


@pytest.mark.parametrize("what", NEARLY)
def test_what_is_not_zeros_around_an_image_is_written(what: str) -> None:
    channels = 5 if what == "channels" else 4
    net = Convolved(NEARLY[what], nn.Conv2d(channels, 8, 3))
    assert _pads_left(net, torch.randn(2, 4, 9, 11), 2e-6) == 1


def test_other_readers_still_get_the_zeros() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            padded = F.pad(x, (1, 0, 2, 1))
            return self.conv(padded), padded, F.pad(padded, (1, 1)).sum((2, 3))

    net, x = Two(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for ours, theirs in zip(go.build(go.capture(net, (x,)), threads=1)(x), net(x), strict=True):
            assert relative_error(ours, theirs) < 1e-6
