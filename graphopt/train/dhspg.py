"""Dual half-space projected gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.train.sparse import SparseOptimizer

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.train.units import Units

__all__ = ["DHSPG"]

_TINY = 1e-30


class DHSPG(SparseOptimizer):
    """Dual half-space projected gradient: the units that matter least are penalised until they cross zero.

    At `start_step` the units are parted once: those with the highest redundancy, half the cosine of -x and -g and half
    the reciprocal of |x| / size (x a unit, g its gradient, both normalised over all units), are to go. Only these get
    a penalty on their norm, in each step as strong as it takes for loss and norm to fall: with d what the base rule
    moves x by, against its sign and per rate, and d'x < 0,

        lo = -d'x / |x|,  hi = -|d|^2 |x| / d'x,  l = amplify * lo within [penalty, limit * penalty],

    and the middle of lo and hi where l is hi or more; elsewhere l = penalty. Then x+ = x - lr (d + l x / |x|), and x+
    becomes zero for good where x+'x <= epsilon |x|^2, that is, where it has left the half-space of x. The rate is
    that of the first parameter group.

    The paper trains on until that has happened to all. Here what is left after `steps` steps is set to zero, so that
    the sparsity is exact; the longer `steps`, the less that is.

    Args:
        penalty, amplify, limit, epsilon: see above; the others as for `SparseOptimizer`.

    Source:
        Chen et al., OTOv2: Automatic, Generic, User-Friendly, ICLR 2023, section 3.2 and appendix.
    """

    def __init__(
        self,
        model: Model,
        lr: float,
        sparsity: float,
        *,
        steps: int,
        penalty: float = 1e-3,
        amplify: float = 1.1,
        limit: float = 10.0,
        epsilon: float = 0.0,
        **options: Any,
    ) -> None:
        if not 0 <= epsilon < 1 or penalty <= 0 or amplify < 1 or limit < 1:
            raise UsageError("epsilon has to be in [0, 1), penalty above 0, amplify and limit at least 1")
        super().__init__(model, lr, sparsity, steps=steps, **options)
        self.penalty, self.amplify, self.limit, self.epsilon = penalty, amplify, limit, epsilon

    def _advance(self, at: int) -> None:
        if at == 0:
            self.chosen = self._choose(-redundancy(self.units), self.quota.goal)
        before = {id(tensor): tensor.detach().clone() for tensor in self.units.tensors}
        self._base_step()
        square = self.units.sums(lambda tensor: before[id(tensor)].square())
        self._penalise(before, square)
        along = self.units.dots(lambda tensor: before[id(tensor)])
        self.zero = self.zero | (self.chosen & (along <= self.epsilon * square))  # these have left their half-space
        if at == self.steps - 1:
            self.zero, self.finished = self.chosen.clone(), True

    def _penalise(self, before: dict[int, Tensor], square: Tensor) -> None:
        """Add the penalty's step to that of the base rule, which has been made; `square` [units] is |x|^2 before it."""
        lr = float(self.param_groups[0]["lr"])
        if lr == 0:
            return
        slope = self.units.sums(lambda tensor: before[id(tensor)] * (before[id(tensor)] - tensor)) / lr
        moved = self.units.sums(lambda tensor: (before[id(tensor)] - tensor).square()) / lr**2
        norm = square.sqrt().clamp(min=_TINY)
        against = slope < 0
        lowest, highest = -slope / norm, moved * norm / (-slope).clamp(min=_TINY)
        strength = (self.amplify * lowest).clamp(self.penalty, self.limit * self.penalty)
        strength = torch.where(strength >= highest, (lowest + highest) / 2, strength)
        strength = torch.where(against, strength, self.penalty)
        factors = torch.where(self.chosen & ~self.zero, -lr * strength / norm, 0.0)
        self.units.add(factors, lambda tensor: before[id(tensor)])


def redundancy(units: Units) -> Tensor:
    """[units] how well each can be spared, by its weights and gradients as they are now."""
    norms = units.norms()
    slopes = units.dots(lambda tensor: tensor.grad)
    gradients = units.sums(lambda tensor: None if tensor.grad is None else tensor.grad.square()).sqrt()
    cosine = slopes / (norms * gradients).clamp(min=_TINY)
    average = norms / units.sizes
    # A unit that is zero already would outweigh all others together in the norm of the reciprocals.
    reciprocal = 1 / average.clamp(min=float(average.mean()) * 1e-3 + _TINY)
    return 0.5 * unit_length(cosine) + 0.5 * unit_length(reciprocal)


def unit_length(values: Tensor) -> Tensor:
    """Values [units] divided by their Euclidean norm."""
    length: Tensor = values.norm().clamp(min=_TINY)
    return values / length
