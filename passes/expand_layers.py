"""More layers that compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.check import Oracle
from graphopt.errors import UsageError
from graphopt.ops import is_pure
from graphopt.passes._blocks import Block, find_blocks, named, outermost
from graphopt.passes._expansion import Draw, Init
from graphopt.passes._expansion_layers import add_behind, why_not
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["ExpandLayers"]


@dataclass(frozen=True)
class ExpandLayers(Pass):
    """Add residual blocks or transformer layers, without changing what the model computes.

    What:
        A copy of a block, with weights of its own, comes behind it; the last layer of each of its branches is zero, so
        that they add nothing yet. Its tensors get the next free number where the block's module has one (layers.2
        behind layers.0 and layers.1), else a name of their own. `remove-layers` of it gives the model back.

    Algebra:
        y = x + f(x), and z = y + f'(y) with f'(y) = W g(y) + b, W = 0 and b = 0. Weights of g are drawn from a normal
        distribution with the deviation of the block's, biases and the vectors of norms are copies. The gradient by W
        is that by any weight; the one by g is zero in the first step, and is not after it.

    When it applies:
        To blocks as `remove-layers` finds them (`unit=layer`) whose branches follow each other directly, are added to
        the very value that they start from, and end with a layer or a norm with weights, whatever scales, drops or
        moves comes behind it. Refused with the reason: projections beside a branch, norms behind a sum, dropout or
        batch norms in training mode, masks that are given to attention from outside.
        Options: `only`, names of blocks or of modules that they are in, behind each of which layers come (else behind
        the last block), and `leave`, behind which none do; `by`, how many; `init`, `normal` or `copy` for the weights
        that are not zero; `seed`.

    Safety:
        Exact: zeros are added. Proven on the spot by a run of both models. Run twice, it adds twice.

    Cost:
        A walk over the graph, two runs of the model. The model is slower by the layers.

    Source:
        Gesmundo & Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023, section 3.6.

    Example:
        >>> import torch, graphopt
        >>> class Block(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> linear, tanh = torch.nn.Linear, torch.nn.Tanh()
        >>> blocks = [Block(linear(8, 8), tanh, linear(8, 8)) for _ in range(2)]
        >>> net = torch.nn.Sequential(linear(5, 8), torch.nn.Sequential(*blocks), linear(8, 3)).eval()
        >>> model = graphopt.capture(net, (torch.randn(2, 5),))
        >>> deep, (report,) = graphopt.run(model, "expand-layers")
        >>> report.findings["added"], deep.params["1.2.2.weight"].abs().max().item()
        ([{'behind': '1.1', 'name': '1.2'}], 0.0)
    """

    name: ClassVar[str] = "expand-layers"
    contract: ClassVar[Contract] = Contract.EXACT

    by: int = 1
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    init: Init = "normal"
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        if self.by < 1:
            raise UsageError(f"by is {self.by}, it has to be at least 1")
        original, draw = rw.model.clone(share_tensors=True).eval(), Draw(self.init, self.seed)
        added: list[dict[str, str]] = []
        for block in reversed(self._blocks(rw)):  # the last one first: a sum that is replaced starts the next block
            if not rw.exhausted:
                names = add_behind(rw, block, self.by, draw)
                added[:0] = [{"behind": block.name, "name": name} for name in names]
        rw.findings["added"] = added
        if added:
            Oracle(original, rw.calib[:1]).judge(rw.model.clone(share_tensors=True).eval(), Contract.EXACT)

    def _blocks(self, rw: Rewriter) -> list[Block]:
        """Those behind which layers come."""
        fit = []
        for node in rw.find() if rw.model.mode == "train" else ():
            if isinstance(rw.value(node), torch.Tensor) and not is_pure(node):
                rw.skip(node, "it draws random numbers or updates statistics: what it is in is no block")
        for block in named(outermost(find_blocks(rw, "layer")), self.only, self.leave):
            why = why_not(rw, block)
            if why is None:
                fit.append(block)
            else:
                rw.skip(block.branches[-1].add, f"no layer comes behind '{block.name}': {why}")
        return fit if self.only else fit[-1:]
