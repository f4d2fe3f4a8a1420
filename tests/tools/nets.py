"""Models for the command line, named `tests.tools.nets:FUNCTION`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphopt.ops import lookup


def small() -> tuple[Any, ...]:
    print("a function that builds a model may print")
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 10)]
    return nn.Sequential(*body).eval(), (torch.randn(2, 3, 8, 8),), {0: {0: "batch"}}


def norms() -> tuple[Any, ...]:
    body = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    return nn.Sequential(*body).eval(), (torch.randn(2, 3, 4, 4),)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def branch() -> tuple[Any, ...]:
    return Branch(), (torch.randn(2, 3),)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) + x


def unknown() -> tuple[Any, ...]:
    assert lookup(torch.ops.aten.special_bessel_j0.default) is None, "choose another operator that is in no table"
    return Unknown(), (torch.randn(2, 3),)


def half() -> tuple[Any, ...]:
    return nn.Linear(3, 3).bfloat16(), (torch.randn(2, 3, dtype=torch.bfloat16),)


def fails() -> tuple[Any, ...]:
    return 1 / 0


def returns_a_module() -> nn.Module:
    return nn.Linear(2, 2)


class RunningSum(nn.Module):
    """A linear layer, and an operator that no kernel is written for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).cumsum(1)


def running_sum() -> tuple[Any, ...]:
    return RunningSum().eval(), (torch.randn(2, 16),)
