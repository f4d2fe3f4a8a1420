"""What blocks are worth on calibration data: how much they change, or what the outputs lose without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from graphopt.analysis.observe import observe
from graphopt.model import Model
from graphopt.ops import argument
from graphopt.passes._blocks import Block, outermost, without
from graphopt.passes._output_error import Batches, OutputError
from graphopt.rewriter import Node

__all__ = ["block_influence", "output_losses"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


def block_influence(model: Model, blocks: Sequence[Block], batches: Batches) -> dict[Block, float]:
    """How much each block turns what goes through it: 1 - mean of cos(x, y), x what the first sum of the block would be
    without it and y what its last sum is. The cosine is taken over the features of every position: channels where the
    block starts with a convolution, else the last axis. NaN where activations are not finite, or x and y differ in
    shape.

    Args:
        model: the model, or one that has lost other blocks.
    """
    named = {node.name: node for node in model.graph.nodes}
    ends = {block: _ends(block, named) for block in blocks}
    sums = {block: torch.zeros(2, dtype=torch.float64) for block in blocks}
    seen: dict[Node, Tensor] = {}

    def keep(node: Node) -> None:
        for block, (x, y) in ends.items():
            if y is node:
                sums[block] += _cosines(seen[x], seen[y], _axis(block))

    def watcher(node: Node, counts: bool) -> Callable[[Tensor], None]:
        def watch(value: Tensor) -> None:
            seen[node] = value
            if counts:
                keep(node)

        return watch

    lasts = {y for _, y in ends.values()}
    watched = {x for x, _ in ends.values()} | lasts
    observe(model, batches, {node: watcher(node, node in lasts) for node in watched})
    return {block: 1 - float(total / count) if count else math.nan for block, (total, count) in sums.items()}


def _ends(block: Block, named: dict[str, Node]) -> tuple[Node, Node]:
    """What the first sum of a block adds to, and the last sum."""
    first, last = block.branches[0], named[block.branches[-1].add.name]
    kept = argument(named[first.add.name], "self" if first.operand else "other")
    assert isinstance(kept, Node)
    return kept, last


def _axis(block: Block) -> int:
    layer = block.branches[0].layers[0].target
    return 1 if getattr(layer, "_opname", "") in _CONVOLUTIONS else -1


def _cosines(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """The sum of the cosines and their number. Two zeros agree, a zero and something else do not."""
    if x.shape != y.shape:
        return torch.tensor([math.nan, 1.0], dtype=torch.float64)
    x, y = (value.double().movedim(axis, -1).flatten(0, -2) for value in (x, y))
    sizes = x.norm(dim=-1) * y.norm(dim=-1)
    same = (x == y).all(-1)
    cosines = torch.where(same, 1.0, (x * y).sum(-1) / sizes.where(sizes > 0, 1.0))
    cosines = torch.where(sizes.isfinite(), cosines, math.nan)
    return torch.tensor([float(cosines.sum()), cosines.numel()], dtype=torch.float64)


def output_losses(
    model: Model, error: OutputError, blocks: Iterable[Block], gone: Sequence[Block]
) -> dict[Block, float]:
    """The relative error of the outputs without each block, those in `gone` having gone already."""
    return {block: error.of(without(model, outermost([*gone, block]))) for block in blocks}
