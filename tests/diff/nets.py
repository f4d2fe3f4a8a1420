"""Small nets with everything that the diff has to match: residual branches, attention, depthwise layers, reshapes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.model import Model
from tests.zoo import calibrate, enliven

__all__ = ["NETS", "captured"]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(8) for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6())
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.rest = nn.Sequential(nn.BatchNorm2d(2 * width), nn.Hardswish(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rest(self.depth(self.expand(x)))


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.blocks = nn.Sequential(*(Inverted(6) for _ in range(4)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.leaky_relu(self.stem(x), 0.1)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layers = nn.Sequential(*(Attention(8, 2) for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(self.embed(x))))


class Branches(nn.Module):
    """Equal branches on one input, a concatenation, and operands in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.second = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for one, two in zip(self.first, self.second, strict=True):
            y = F.relu(one(x))
            parts.append(torch.sigmoid(two(y)) * y + F.relu(x))
        joined = torch.cat(parts, -1)
        return self.head(F.silu(joined * joined.abs()).tanh())


NETS = {
    "resnet": (Resnet, (2, 3, 10, 10)),
    "mobile": (Mobile, (2, 3, 8, 8)),
    "transformer": (Transformer, (2, 5, 6)),
    "branches": (Branches, (3, 6)),
}


@cache
def captured(name: str) -> Model:
    """The net, captured once; nobody may change it."""
    make, shape = NETS[name]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        enliven(net)
        x = torch.randn(shape)
        calibrate(net, [(torch.randn(8, *shape[1:]),)])
    return go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}})
