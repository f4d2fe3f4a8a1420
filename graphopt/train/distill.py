"""Learning from a teacher: its logits, and what it has inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from graphopt.errors import UsageError
from graphopt.model import Model, output_leaves
from graphopt.names import nearest

__all__ = ["Distill", "InnerLoss", "logit_loss", "tapped"]


@dataclass(frozen=True)
class Distill:
    """How much a student learns from its teacher.

    Attributes:
        logits: weight of the teacher's logits, from 0 to 1; the targets get the rest.
        temperature: divides both sides' logits (Hinton et al., Distilling the Knowledge in a Neural Network, 2015).
        inner: names of nodes that teacher and student have in common, whose values are compared as well.
        inner_weight: of the mean of these comparisons (20 to 30 in Aflalo et al., Knapsack Pruning with Inner
            Distillation, 2020, for losses that are not normalised; ours are relative to the teacher's values).
    """

    logits: float = 0.5
    temperature: float = 2.0
    inner: tuple[str, ...] = ()
    inner_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.logits <= 1:
            raise UsageError(f"the weight of the teacher's logits is {self.logits:g}, it has to be from 0 to 1")
        if self.temperature <= 0:
            raise UsageError(f"the temperature is {self.temperature:g}, it has to be above 0")


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened class probabilities, times T squared so that its gradient keeps its size; logits are
    [..., classes]."""
    a, b = (functional.log_softmax(logits / temperature, -1).flatten(0, -2) for logits in (student, teacher))
    return functional.kl_div(a, b, reduction="batchmean", log_target=True) * temperature**2


class InnerLoss(nn.Module):
    """Mean over places inside of the mean square of t - M s, relative to that of t in the first batch, with
    M [teacher's width, student's] where widths differ.

    The maps M start as what fits the first batch best and are trained with the student; afterwards they are not needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList()

    def prepare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], names: Sequence[str]) -> None:
        """Make the maps for values of these shapes.

        Raises:
            UsageError: when two values differ along more than one axis.
        """
        for name, s, t in zip(names, student, teacher, strict=True):
            self.maps.append(_Map(s, t, name))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = [
            (mapped(s) - t).square().mean() / mapped.scale
            for mapped, s, t in zip(self.maps, student, teacher, strict=True)
        ]
        return torch.stack(losses).mean()


class _Map(nn.Module):
    def __init__(self, student: Tensor, teacher: Tensor, name: str) -> None:
        super().__init__()
        differing = [axis for axis in range(teacher.dim()) if student.shape[axis] != teacher.shape[axis]]
        if student.dim() != teacher.dim() or len(differing) > 1:
            raise UsageError(
                f"'{name}' is {list(student.shape)} in the student and {list(teacher.shape)} in the teacher",
                todo="compare values that differ in one width",
            )
        self.axis = differing[0] if differing else None
        self.register_buffer("scale", teacher.detach().square().mean().clamp(min=1e-12))
        if self.axis is not None:
            rows, wanted = (x.detach().movedim(self.axis, -1).flatten(0, -2) for x in (student, teacher))
            # The ridge keeps channels that are dead in this batch from getting huge weights.
            gram = rows.T @ rows
            gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
            self.matrix = nn.Parameter(torch.linalg.solve(gram, rows.T @ wanted))  # [student, teacher]

    def forward(self, value: Tensor) -> Tensor:
        if self.axis is None:
            return value
        return (value.movedim(self.axis, -1) @ self.matrix).movedim(-1, self.axis)


def tapped(model: Model, names: Sequence[str]) -> fx.GraphModule:
    """A module that shares the model's tensors and returns [output, inner values]: the model's first output, and what
    the nodes of these names make.

    Raises:
        UsageError: when there is no such node, with the nearest names.
    """
    copy = model.clone(share_tensors=True)
    by_name = {node.name: node for node in copy.graph.nodes}
    for name in names:
        if name not in by_name:
            raise UsageError(f"no value inside is called '{name}'", todo=nearest(name, by_name))
    output = next(node for node in copy.graph.nodes if node.op == "output")
    output.args = ([output_leaves(copy.graph)[0], *(by_name[name] for name in names)],)
    copy.graph.set_codegen(fx.graph.CodeGen())
    copy.touch()
    return copy.module
