"""Merging of layers that follow each other with nothing in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from graphopt.errors import UsageError
from graphopt.fake import FakeTensor
from graphopt.passes._linear import POOLS, is_layer
from graphopt.passes._merged_layer import Price
from graphopt.passes._parallel_sums import is_sum, merge_sum
from graphopt.passes._pooled import average_first, into_linear, is_global_average
from graphopt.passes._rounds import Note, walk_until_still
from graphopt.passes._sequences import chain_to, merge_chain
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["MergeSequential"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeSequential(Pass):
    """Merge convolutions or linear layers that follow each other into one, where that is exact and pays.

    What:
        Without an activation in between two convolutions are one, and so are two linear layers, a depthwise and a
        pointwise convolution, or a convolution and the average pooling after it. A pointwise convolution whose output
        is averaged over the whole image works on the average instead, and goes into the linear layer behind that. A
        skip around what was merged becomes one more in the middle of its kernel.

    Algebra:
        M[:, :, v * d2 * s1 + w * d1] += W2[:, :, v] @ W1[:, :, w] over all pairs of taps, with W1 [mid, in/g1, *k1],
        W2 [out, mid/g2, *k2], strides s and dilations d; b = b2 + sum over v of W2[:, :, v] @ b1, stride s1 * s2,
        padding p1 + p2 * s1, as many groups as g1 and g2 have in common. mean(W x + b) = W mean(x) + b.
        x + conv(x, W) = conv(x, W') with W'[c, c, centre] = W[c, c, centre] + 1.

    When it applies:
        Chains of layers, batch norms, multiplications, pads and average poolings that read each other alone, split
        into those stretches that cost least: in multiply-accumulates, or, with a `target`, in what each layer takes
        alone there by measurement with `threads` threads. What is exact and does not pay is reported with both costs.
        At the border a second layer that pads reads zeros where a merged one reads what the first makes of zeros: such
        pairs are left alone, unless the first adds no bias and reaches its input from none of these positions, as a
        1x1 kernel without padding and bias does. Left alone as well, each with its reason: outputs with other users;
        weights shared, tied, masked or computed, of another dtype, kind or precision; transposed convolutions.
        `padding` = `move` merges across the border rule too, and puts all padding in front.

    Safety:
        Exact: only the order of multiplications and sums changes. Computed in float64, stored in the weight's dtype.
        With `padding` = `move` positions near the border change, and the contract is lossy.

    Cost:
        One product of the weights for every merge; with a `target` a compilation for every layer never measured there.

    Source:
        Distributivity. Fu et al., DepthShrinker, arXiv:2206.00843; for the border Kim et al., LayerMerge,
        arXiv:2406.12837.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 4, 1)).eval()
        >>> model = graphopt.capture(net, (torch.randn(1, 3, 8, 8),))
        >>> merged, reports = graphopt.run(model, "merge-sequential")
        >>> {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()}
        {'merged.weight': (4, 3, 3, 3), 'merged.bias': (4,)}
    """

    name: ClassVar[str] = "merge-sequential"
    contract: ClassVar[Contract] = Contract.EXACT

    target: str | None = None
    threads: int | None = None
    padding: Literal["exact", "move"] = "exact"

    def __post_init__(self) -> None:
        if self.padding not in ("exact", "move"):
            raise UsageError(
                f"padding of '{self.name}' is '{self.padding}'",
                todo="leave it out or say 'exact' to keep the border, say 'move' to put all padding in front",
            )
        if self.padding == "move":
            # The option decides what is promised; frozen fields are written like this.
            object.__setattr__(self, "contract", Contract.LOSSY("output error"))

    def run(self, rw: Rewriter) -> None:
        price = Price(rw.model, self.target, self.threads)
        walk_until_still(rw, lambda note: self._walk(rw, price, note))

    def _walk(self, rw: Rewriter, price: Price, note: Note) -> None:
        """Merge once from back to front."""
        seen: set[Node] = set()
        for node in reversed(list(rw.find())):
            if node._erased or node in seen or rw.exhausted:
                continue
            if is_global_average(rw, node):
                average_first(rw, node, price, note)
            elif node.target is aten.linear.default and into_linear(rw, node, price, note):
                continue
            elif _may_end(rw, node):
                axes = 0 if node.target is aten.linear.default else rw.fake(node).dim() - 2
                seen.update(self._merge(rw, node, axes, price, note))

    def _merge(self, rw: Rewriter, node: Node, axes: int, price: Price, note: Note) -> list[Node]:
        """Merge the chain that ends at `node`, and the skip around it; the calls that were looked at."""
        steps = chain_to(rw, node, axes, note)
        looked_at = [step.node for step in steps]
        if sum(not step.is_free for step in steps) < 2:
            return looked_at
        made = merge_chain(rw, steps, price, note, move=self.padding == "move")
        if made is not None and not made._erased and len(made.users) == 1:
            user = next(iter(made.users))
            if is_sum(rw, user):
                merge_sum(rw, user, price, note, axes)
        return looked_at


def _may_end(rw: Rewriter, node: Node) -> bool:
    """Whether a chain of more than one call may end here: a layer or an average that reads a call."""
    if not (is_layer(node) or node.target in POOLS) or not isinstance(rw.value(node), FakeTensor):
        return False
    source: Any = node.args[0] if node.args else None
    return isinstance(source, Node) and source.op == "call_function"
