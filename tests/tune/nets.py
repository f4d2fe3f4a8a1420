"""A net with a task of most kinds, and what the tests of tuning share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.tvm.kernels.choices import Choices
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.tune.database import Environment, Row
from graphopt.target import this_machine

ENVIRONMENT = Environment(1, "0.27", "a processor", "{}", 1, False)
ONE, TWO = Choices(tile=(4, 2)), Choices(steps=2, division=(2, 1, 1))


class Net(nn.Module):
    """Direct, Winograd's and depthwise convolutions, a chain, products, attention."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.square = nn.Conv2d(channels, channels, 3, padding=1)
        self.wide = nn.Conv2d(channels, 96, 1)
        self.depth = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.alone = nn.Conv2d(96, 96, 3, stride=2, padding=1, groups=96)
        self.narrow = nn.Conv2d(96, channels, 1)
        self.heads = nn.Linear(channels, 3 * channels)
        self.last = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.square(torch.relu(self.stem(x))))
        x = torch.relu(self.depth(torch.relu(self.wide(x))))
        x = self.narrow(torch.sigmoid(self.alone(x))).flatten(2).transpose(1, 2)
        q, k, v = self.heads(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return torch.softmax(x @ x.transpose(1, 2), -1) @ self.last(torch.cat([x, x], -1)[..., :32])


def model() -> go.Model:
    torch.manual_seed(0)
    return go.capture(Net().eval(), (torch.randn(1, 3, 24, 24),))


def machine(threads: int = 1) -> Machine:
    return Machine.of(this_machine(), threads)


def ok(task: str, choices: Choices, ratio: float, seconds: float = 1.0) -> Row:
    return Row(task, choices, "ok", ratio, seconds * ratio)


def place(folder: Path) -> Path:
    return folder / "tuning.sqlite"
