"""Merging of convolutions that read one value: their sum into one, their concatenation into a wider one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes._layout import relax_views
from graphopt.passes._merged_layer import Price
from graphopt.passes._parallel_layers import merge_layers
from graphopt.passes._parallel_sums import ADDITIONS, is_sum, merge_sum
from graphopt.passes._rounds import Note, walk_until_still
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["MergeParallelConv"]


@dataclass(frozen=True)
class MergeParallelConv(Pass):
    """Merge convolutions on one input: those that are added up into one, those side by side into a wider one.

    What:
        Blocks that train with several branches and need one: 3x3 + 1x1 + identity, each with a batch norm (RepVGG,
        MobileOne, GhostNetV3), 3x3 + 1x3 + 3x1, average pooling, scaled, grouped, depthwise and dilated branches. And
        convolutions of one input whose outputs are concatenated or go separate ways (Inception): one product that
        reads x once.

    Algebra:
        conv(x, A) + conv(x, B) = conv(x, A + B), where W [out, in/groups, *k] of the smaller kernel lies at its place
        in the larger one, W[o, i, centre] for 1x1; the identity is W[c, c, centre] = 1, a batch norm s * x + t is
        W[c, c, centre] = s[c] and b = t, an average of k taps W[c, c, :] = 1/k. A branch of several steps is composed
        first (see merge-sequential).
        [conv(x, A), conv(x, B)] = split(conv(x, cat(A, B))), W [outA + outB, in, *k].

    When it applies:
        Branches of one value whose strides and output sizes agree, on 1, 2 or 3 axes, where that costs no more: in
        multiply-accumulates, or, with a `target`, in what each layer takes alone there by measurement with `threads`
        threads. Outputs side by side stay separate where `concat` is false, and without a target where different
        activations follow them. What is exact and does not pay is reported with both costs. Left alone, each with its
        reason: weights shared, tied, masked or computed, of another dtype, kind or precision; a value between two
        steps with other users; steps that pad what was shifted; averages that leave out their padding; transposed
        convolutions; norms that train; outputs side by side that are outputs of the model or go into an unknown
        operator, because pieces of a split have gaps between them.

    Safety:
        Exact: only the order of multiplications and sums changes. Computed in float64, stored in the weight's dtype.
        A sum trains on where any of its branches did; its norms can no longer update statistics.

    Cost:
        One pass over every merged weight; with a `target` a compilation for every layer never measured there.

    Source:
        Ding et al., RepVGG, arXiv:2101.03697; Ding et al., Diverse Branch Block, arXiv:2103.13425; Vasu et al.,
        MobileOne, arXiv:2206.04040.

    Example:
        >>> import torch, graphopt
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.wide, self.narrow = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1)
        ...         self.norm = torch.nn.BatchNorm2d(8)
        ...     def forward(self, x):
        ...         return self.wide(x) + self.narrow(x) + self.norm(x)
        >>> model = graphopt.capture(Block().eval(), (torch.randn(1, 8, 6, 6),))
        >>> merged, reports = graphopt.run(model, "merge-parallel-conv")
        >>> [node.name for node in merged.graph.nodes if node.op == "call_function"]
        ['conv2d_default']
        >>> {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()}
        {'merged.weight': (8, 8, 3, 3), 'merged.bias': (8,)}
    """

    name: ClassVar[str] = "merge-parallel-conv"
    contract: ClassVar[Contract] = Contract.EXACT

    target: str | None = None
    threads: int | None = None
    concat: bool = True

    def run(self, rw: Rewriter) -> None:
        price = Price(rw.model, self.target, self.threads)
        walk_until_still(rw, lambda note: self._walk(rw, price, note))
        if rw.changed:
            relax_views(rw)

    def _walk(self, rw: Rewriter, price: Price, note: Note) -> None:
        """Merge once from front to back."""
        for node in rw.find(*ADDITIONS):
            inner = len(node.users) == 1 and is_sum(rw, next(iter(node.users)))
            if not inner and is_sum(rw, node) and (axes := rw.fake(node).dim() - 2) in (1, 2, 3):
                merge_sum(rw, node, price, note, axes)
        if self.concat:
            merge_layers(rw, price, note)
