"""Arithmetic on free sizes: what torch.export leaves of it in a graph has a row, is verified, and is kept in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt import ops


class Scales(nn.Module):
    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(x)


FACTORS: dict[str, Callable[[Tensor], float]] = {
    "round": lambda x: round(x.shape[0] / 2),
    "_sym_sqrt": lambda x: torch.sym_sqrt(x.shape[0]),
    "sym_sum": lambda x: torch.sym_sum([x.shape[0], x.shape[1], x.shape[0]]),
    "sym_max": lambda x: max(x.shape[0], x.shape[1]),
    "abs": lambda x: abs(x.shape[0] - 7),
    "lshift": lambda x: x.shape[0] << 1,
    "rshift": lambda x: x.shape[0] >> 1,
}
"""By the name of the function that they leave in a graph."""


@pytest.mark.parametrize("name", FACTORS)
def test_functions_on_sizes_have_a_row_and_go_through_a_file(name: str, tmp_path: Path) -> None:
    net = Scales(FACTORS[name])
    model = go.capture(net, (torch.randn(4, 5),), dynamic={0: {0: "a", 1: "b"}})
    (node,) = [n for n in model.graph.nodes if getattr(n.target, "__name__", "") == name]
    info = ops.lookup(node.target)
    assert info is not None and info.kind is ops.Kind.SIZE
    assert ops.is_pure(node) and not ops.is_barrier(node)
    model.save(tmp_path / "net.gopt")
    again = go.load(tmp_path / "net.gopt")
    for size in (3, 6, 11):
        x = torch.randn(size, 7)
        assert torch.equal(model(x), net(x)) and torch.equal(again(x), net(x))
