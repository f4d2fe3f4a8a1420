"""What errors of a layer's outputs count: second moments of the gradients of the model's outputs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.model import Model
from graphopt.passes._factor_layers import Whole

__all__ = ["fisher"]

_DIRECTIONS = 4
_WIDEST = 4096
"""Outputs of a group: of more of them the diagonal is kept alone."""


def fisher(model: Model, calib: Sequence[Sequence[Tensor]], layers: Sequence[Whole], seed: int) -> dict[str, Tensor]:
    """F [groups, m, m] by the name of a layer: sums of g g^T over all positions of its outputs and random directions of
    the model's outputs, g being the gradients at the m outputs of a group. Of very many outputs its diagonal [groups,
    m].

    With moments C of what the layer reads, tr(F D C D^T) stands for the square of what the model's outputs change by
    when the weight changes by D, if gradients and inputs are independent. (Martens and Grosse, Optimizing Neural
    Networks with Kronecker-factored Approximate Curvature, ICML 2015; the diagonal of F alone weighs rows in Hsu et
    al., Language Model Compression with Weighted Low-Rank Factorization, ICLR 2022.)
    """
    copy = model.clone(share_tensors=True)
    anchor = torch.zeros((), requires_grad=True)
    sums: dict[str, Tensor] = {}
    named = {node.name: node for node in copy.graph.nodes}
    for whole in layers:
        node = named[whole.node.name]
        users = list(node.users)
        with copy.graph.inserting_after(node):
            seen = copy.graph.call_function(_Probe(whole, sums, anchor), (node,))
        for user in users:
            user.replace_input_with(node, seen)
    copy.touch()
    generator = torch.Generator().manual_seed(seed)
    for batch in calib:
        outputs = [y for y in copy.call_flat(batch) if y.is_floating_point() and y.requires_grad]
        for turn in range(_DIRECTIONS if outputs else 0):
            signs = [torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1 for y in outputs]
            # Into the anchor alone: no weight gets a gradient, which may be the user's own.
            torch.autograd.backward(outputs, signs, retain_graph=turn < _DIRECTIONS - 1, inputs=[anchor])
    return {name: total for name, total in sums.items() if bool(total.any())}


class _Probe:
    """Returns what it is given, and adds up the gradients that come back."""

    __name__ = "probe"

    def __init__(self, whole: Whole, sums: dict[str, Tensor], anchor: Tensor) -> None:
        self.whole, self.sums, self.anchor = whole, sums, anchor

    def __call__(self, value: Tensor) -> Tensor:
        passed: Tensor = _Passed.apply(value, self.anchor, self.add)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return passed

    def add(self, gradient: Tensor) -> None:
        wide = gradient.detach().double().cpu()
        rows = (wide.movedim(1, -1) if self.whole.kernel.axes else wide).flatten(0, -2)
        by_group = rows.unflatten(-1, (self.whole.groups, -1)).transpose(0, 1)
        wide = by_group.shape[-1] > _WIDEST
        found = by_group.square().sum(1) if wide else by_group.transpose(1, 2) @ by_group
        name = self.whole.node.name
        self.sums[name] = self.sums.get(name, torch.zeros(())) + found


class _Passed(torch.autograd.Function):
    """The identity of its first argument. The second one makes gradients come back though nothing is trained."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, add: Callable[[Tensor], None]) -> Tensor:
        ctx.add = add
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.add(gradient)
        return gradient, torch.zeros(()), None
