"""Blocks that train with several branches, written small, with statistics as after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.zoo import calibrate, enliven

__all__ = ["Branches", "GhostBlock", "MobileOneBlock", "RepVGGBlock", "conv_norm", "trained"]


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, **more: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3))


class Branches(nn.Module):
    """The sum of branches of one value, and a ReLU."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out.relu()


class RepVGGBlock(Branches):
    """3x3 and 1x1, and the identity where shapes allow it, each with a batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        convs = [conv_norm(inputs, outputs, size, stride, groups) for size in (3, 1)]
        same = [nn.BatchNorm2d(inputs)] if inputs == outputs and stride == 1 else []
        super().__init__(*convs, *same)


class MobileOneBlock(nn.Module):
    """Several convolutions of one kind, a 1x1 and the identity, summed from zero as its authors do; then a 1x1 one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, count: int = 3) -> None:
        super().__init__()
        self.wide = self._parts(inputs, inputs, 3, stride, inputs, count)
        self.mix = self._parts(inputs, outputs, 1, 1, 1, count)

    @staticmethod
    def _parts(inputs: int, outputs: int, size: int, stride: int, groups: int, count: int) -> nn.ModuleList:
        parts = [conv_norm(inputs, outputs, size, stride, groups) for _ in range(count)]
        parts += [conv_norm(inputs, outputs, 1, stride, groups)] if size > 1 else []
        parts += [nn.BatchNorm2d(inputs)] if inputs == outputs and stride == 1 else []
        return nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for parts in (self.wide, self.mix):
            out = 0
            for part in parts:
                out = out + part(x)
            x = out.relu()
        return x


class GhostBlock(nn.Module):
    """A pointwise part with branches, and cheap depthwise features of it with branches, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = Branches(*[conv_norm(inputs, half, 1) for _ in range(3)])
        cheap = [conv_norm(half, half, 3, groups=half) for _ in range(3)]
        self.cheap = Branches(*cheap, conv_norm(half, half, 1, groups=half), nn.BatchNorm2d(half))

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)


def trained(make: Callable[[], nn.Module], shape: Sequence[int]) -> nn.Module:
    """A net in eval mode: no parameter is constant, and its norms have the statistics of data that went through."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().eval()
        enliven(net)
        calibrate(net, [(torch.randn(4, *shape),) for _ in range(2)])
    return net
