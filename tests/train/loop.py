"""A model that is always the same, data that it can learn, and a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.coupling import Coupling, Group
from tests.coupling import nets

__all__ = ["batches", "captured", "equal", "first_captured", "producers", "train"]


@cache
def first_captured(name: str) -> go.Model:
    net, args, _ = nets.build(name)
    return go.capture(net, args, dynamic={0: {0: "batch"}}).train()


def captured(name: str = "residual") -> go.Model:
    """A model of its own, always with the same weights."""
    return first_captured(name).clone()


def batches(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images whose mean colours say what class they are."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    for _ in range(count):
        x = torch.randn(8, 3, 8, 8, generator=generator) + torch.randn(8, 3, 1, 1, generator=generator)
        yield x, (x.mean((2, 3)) @ colours).argmax(1)


def train(
    model: go.Model, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]], extra: Any = None
) -> float:
    loss = torch.zeros(())
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.module(x), y)
        loss.backward()
        if extra is not None:
            extra()
        optimizer.step()
    return float(loss.detach())


def equal(a: go.Model, b: go.Model) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def producers(coupling: Coupling, group: Group) -> list[tuple[Tensor, int, np.ndarray]]:
    """What makes the units of a group, each with axis and family 0 to n, tied ones once."""
    found = {}
    for member in group.members:
        tensor = coupling.model.params[member.name]
        if member.slot.role == "out" or (member.slot.role == "scale" and isinstance(tensor, torch.nn.Parameter)):
            found[id(tensor), member.slot.axis] = (tensor, member.slot.axis, member.unit)
    return list(found.values())
