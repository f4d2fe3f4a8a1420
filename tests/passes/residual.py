"""Nets of residual blocks, and what tests ask of those with fewer of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import GraphoptError


class BasicBlock(nn.Module):
    """As in a resnet18: two convolutions, a projection where size or width change."""

    def __init__(self, size: int, out: int | None = None, stride: int = 1, last: float = 1.0) -> None:
        super().__init__()
        out = out or size
        self.conv1, self.bn1 = nn.Conv2d(size, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = out == size and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(size, out, 1, stride), nn.BatchNorm2d(out))
        nn.init.uniform_(self.bn2.weight, 0.5 * last, last)
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.short(x) + (0 if self.skipped else made))


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*blocks), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def resnet(last: Sequence[float] = (1.0, 0.3, 1.0, 0.6)) -> ResNet:
    net = ResNet(
        BasicBlock(4, last=last[0]),
        BasicBlock(4, last=last[1]),
        BasicBlock(4, 8, 2, last=last[2]),
        BasicBlock(8, last=last[3]),
    )
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))  # statistics, and sizes of lazy layers
    return net.eval()


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def mlp(size: int = 6, inner: int = 8) -> Residual:
    return Residual(nn.Linear(size, inner), nn.Tanh(), nn.Linear(inner, size))


def adding(value: float) -> Residual:
    """Adds a number, whatever comes in."""
    block = Residual(nn.Linear(1, 1))
    nn.init.zeros_(block.layers[0].weight)
    nn.init.constant_(block.layers[0].bias, value)
    return block


IMAGE = (2, 3, 8, 8)


def batches(shape: Sequence[int] = IMAGE, count: int = 2) -> list[list[Tensor]]:
    return [[torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(seed))] for seed in range(count)]


def capture(net: nn.Module, shape: Sequence[int] = IMAGE) -> go.Model:
    return go.capture(net.eval(), (torch.randn(shape),), dynamic={0: {0: "batch"}})


def shortened(
    model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None
) -> tuple[go.Model, go.Report]:
    small, (report,) = go.run(model, f"remove-layers{{{text}}}", calib=batches() if calib is None else calib)
    json.dumps(report.to_json())
    return small, report


def removed(report: go.Report) -> list[str]:
    return [row["block"] for row in report.findings["removed"]]


def worth(report: go.Report) -> dict[str, float]:
    return {row["block"]: row["importance"] for row in report.findings["blocks"]}


def distance(calib: Sequence[Sequence[Tensor]], ours: Callable[[Tensor], Tensor], theirs: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(ours(x).double(), theirs(x).double()) for (x,) in calib]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())


def failure(model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None) -> str:
    with pytest.raises(GraphoptError) as caught:
        go.run(model, f"remove-layers{{{text}}}", calib=batches() if calib is None else calib)
    return str(caught.value)
