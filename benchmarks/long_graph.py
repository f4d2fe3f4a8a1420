"""A graph of any length: one captured block repeated, every copy with weights of its own.

torch.export takes minutes for 10,000 operators; copying the block's nodes takes a second, and what comes out is the
same as if a module of that many blocks had been captured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.model import Model, empty_module
from graphopt.rewriter import Node
from graphopt.verify import verify

__all__ = ["long_graph"]


class Block(nn.Module):
    """Something to do for every exact pass: dropout, reshapes, a constant, two equal calls, scales, two linears."""

    def __init__(self, channels: int = 8, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.left, self.right = (nn.Linear(size * size, size * size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu6(self.bn(self.conv(x) * 0.5)), 0.1, self.training)
        y = y.flatten(2).reshape(x.shape[0], -1, 1, self.size**2).squeeze(2)
        half = torch.ones(1) * 0.5
        y = self.left(y) * half + self.right(y) * half
        y = y.unflatten(2, (self.size, self.size))
        return x + 0.1 * y


def long_graph(operators: int) -> Model:
    """Blocks one after the other, of about this many operators in total, with a free batch size."""
    model = go.capture(Block().eval(), (torch.randn(2, 8, 4, 4),), dynamic={"x": {0: "batch"}})
    calls = sum(node.op == "call_function" for node in model.graph.nodes)
    module = empty_module()
    graph = module.graph
    copy = Model(module, model.signature, model.shapes, example=model.example)
    generator = torch.Generator().manual_seed(0)
    nodes = list(model.graph.nodes)
    (entry,) = (node for node in nodes if node.op == "placeholder")
    output = nodes[-1]
    (result,) = output.args[0]
    made: dict[Node, Node] = {}
    for number in range(max(operators // calls, 1)):
        made[entry] = made[result] if number else graph.node_copy(entry)
        for node in nodes:
            if node.op == "get_attr":
                made[node] = graph.node_copy(node)
                _own_tensor(made[node], number, model, copy, generator)
            elif node.op == "call_function":
                made[node] = graph.node_copy(node, made.__getitem__)
                _own_path(made[node], number)
    graph.node_copy(output, made.__getitem__)
    graph._codegen = model.graph._codegen
    copy.touch()
    verify(copy)
    return copy


def _own_tensor(node: Node, number: int, model: Model, copy: Model, generator: torch.Generator) -> None:
    """A random tensor for one copy of a tensor node: noise that keeps variances positive."""
    template = model.params[str(node.target)]
    node.target = f"{number}.{node.target}"
    noise = torch.rand(template.shape, generator=generator) * 0.2 + 0.9
    copy.params.add(node.target, template.detach() * noise, model.params.kind(node.target.partition(".")[2]))


def _own_path(node: Node, number: int) -> None:
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {
        f"{key}_{number}": (f"{number}.{path}" if path else str(number), kind) for key, (path, kind) in stack.items()
    }
