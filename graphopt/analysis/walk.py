"""A model run node by node, on several batches side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from graphopt.model import Model
from graphopt.signature import TensorSpec

__all__ = ["Walk"]


class Walk:
    """Where a run of a model stands. A value is kept until its last reader has run."""

    def __init__(self, model: Model, batches: Sequence[Sequence[Tensor]]) -> None:
        self._nodes = list(model.graph.nodes)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._next = 0
        self._runs = [_Run(model, batch) for batch in batches]

    @torch.no_grad()
    def before(self, node: Node) -> None:
        """Run everything that stands before `node` in the graph, and was not run yet."""
        while self._next < self._place[node]:
            for run in self._runs:
                run.step(self._nodes[self._next])
            self._next += 1

    def values(self, node: Node) -> list[Tensor]:
        """What a node has made on every batch; it was run, and somebody still has to read it."""
        return [run.env[node] for run in self._runs]

    def replace(self, node: Node, value: Tensor) -> None:
        """Let those that are still to run read something else."""
        for run in self._runs:
            run.env[node] = value


class _Run(fx.Interpreter):
    def __init__(self, model: Model, batch: Sequence[Tensor]) -> None:
        super().__init__(model.module)
        leaves = iter(batch)
        values: list[Any] = [next(leaves) if isinstance(s, TensorSpec) else s.value for s in model.signature.inputs]
        self.args_iter = iter(values)

    def step(self, node: Node) -> None:
        self.env[node] = self.run_node(node)
        for read in self.user_to_last_uses.get(node, ()):
            del self.env[read]
