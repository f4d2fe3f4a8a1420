"""A small net to search pipelines for, data for it, and latencies that need no compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.measure import Stopwatch
from graphopt.model import Model

__all__ = ["PASSES", "CountedLatency", "batches", "chain", "model"]

PASSES = "prune-channels{macs=0.2..0.95,step=4|1},low-rank{macs=0.3..0.95}"
"""What takes no compilation."""


def chain() -> tuple[Any, ...]:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6)]
    return nn.Sequential(*layers).eval(), (torch.randn(1, 12),), {0: {0: "batch"}}


def model() -> Model:
    net, args, dynamic = chain()
    return go.capture(net, args, dynamic=dynamic)


def batches(seed: int = 1) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    return [(torch.randn(40, 5, generator=generator) @ mixing,)]


class CountedLatency:
    """Stands in for `Deployed`: the latency is the part of multiply-accumulates that is left."""

    def __init__(self, original: Model, watch: Stopwatch) -> None:
        self.original = sum(layer_macs(original).values())

    def timer(self, deployed: Model) -> Callable[[], float]:
        return lambda: sum(layer_macs(deployed).values()) / self.original
