"""Hybrid efficient structured sparse optimizers: units are chosen period by period, and shrunk to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.train.sparse import SparseOptimizer

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.train.units import Units

__all__ = ["HESSO", "HESSOCric"]

_TINY = 1e-30


class HESSO(SparseOptimizer):
    """Hybrid efficient structured sparse optimizer: no parameter to tune but the number of steps.

    The steps are parted into periods. Each begins by choosing its share of the units, the lowest `saliency` of all
    groups together. Then in step t = 0, ..., T - 1 of the period the base rule updates everything, and the chosen units
    are multiplied by (T - t - 1) / (T - t), so that they arrive at zero evenly, with the last step.

    Args:
        periods: how often to choose; `steps` has to be at least as many. The others as for `SparseOptimizer`.

    Source:
        Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning, 2024,
        section 3.
    """

    _fixed: ClassVar[tuple[str, ...]] = (*SparseOptimizer._fixed, "periods")

    def __init__(
        self, model: Model, lr: float, sparsity: float, *, steps: int, periods: int = 10, **options: Any
    ) -> None:
        if not 1 <= periods <= steps:
            raise UsageError(f"periods is {periods}, it has to be from 1 to steps, which is {steps}")
        super().__init__(model, lr, sparsity, steps=steps, **options)
        self.periods = periods

    def _advance(self, at: int) -> None:
        period = ((at + 1) * self.periods - 1) // self.steps
        first, end = (self.steps * number // self.periods for number in (period, period + 1))
        if at == first:
            share = self.quota.goal * (period + 1) // self.periods
            self.chosen = self._choose(saliency(self.units), share)
        self._base_step()
        _shrink(self, at - first, end - first)
        self.finished = at == self.steps - 1


class HESSOCric(SparseOptimizer):
    """HESSO with a corrective redundant identification cycle: what looks spare is tried out before it goes.

    A saliency at the weights as they are says little about the way to zero. So in every cycle the units with the lowest
    mean saliency that were not tried before are scaled to 1 - i / samples for i = 1, ..., samples; at each of these
    points the saliency is taken again, of the full weights with the gradient found there, which for its first-order
    terms is the path integral of the loss's change. Then the weights are put back. Cycles end when nothing new is among
    the lowest. After that the lowest mean saliencies go in `steps` steps, as in a period of `HESSO`.

    During the cycles gradients are looked at and nothing is trained; they take cycles * (samples + 1) steps at
    most. Save a model between them only along with the optimizer's state, which holds the full weights. What the
    paper's implementation adds, trials of whole layers by the loss, is left out: it takes six steps a group.

    Args:
        cycles: at most so many.
        samples: points on the way to zero.
        tolerance: cycles end when no more than so many units are new. The others as for `SparseOptimizer`.

    Source:
        Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning, 2024,
        section 4.
    """

    _fixed: ClassVar[tuple[str, ...]] = (*SparseOptimizer._fixed, "cycles", "samples", "tolerance")
    _kept: ClassVar[tuple[str, ...]] = (
        *SparseOptimizer._kept,
        *("cycle", "trial", "shrunk", "total", "counts", "tried", "trying", "full"),
    )

    def __init__(
        self,
        model: Model,
        lr: float,
        sparsity: float,
        *,
        steps: int,
        cycles: int = 8,
        samples: int = 4,
        tolerance: int = 0,
        **options: Any,
    ) -> None:
        if cycles < 0 or samples < 1 or tolerance < 0:
            raise UsageError("cycles and tolerance have to be at least 0, samples at least 1")
        super().__init__(model, lr, sparsity, steps=steps, **options)
        self.cycles, self.samples, self.tolerance = cycles, samples, tolerance
        self.cycle = self.trial = self.shrunk = 0
        self.total = torch.zeros(self.units.count, dtype=self.units.dtype)
        self.counts = torch.zeros(self.units.count, dtype=torch.int64)
        self.tried, self.trying = self.zero.clone(), self.zero.clone()
        self.full: list[Tensor] = []

    def _advance(self, at: int) -> None:
        if not self.shrunk and self._measure():
            return
        self._base_step()
        _shrink(self, self.shrunk, self.steps)
        self.shrunk += 1
        self.finished = self.shrunk == self.steps

    def _measure(self) -> bool:
        """Take the saliency at this point, and go to the next; says whether there is one."""
        score = saliency(self.units, self._full)
        measured = self.trying if self.trial else torch.ones_like(self.zero)
        self.total += torch.where(measured, score, 0)
        self.counts += measured
        if self.trial == 0:
            lowest = self.quota.lowest(self.total / self.counts, self.quota.goal)
            self.trying = lowest & ~self.tried
            if self.cycle == self.cycles or int(self.trying.sum()) <= self.tolerance:
                self.chosen = lowest
                return False
            self.full = [tensor.detach().clone() for tensor in self.units.tensors]
        self._put_back()
        if self.trial == self.samples:
            self.tried |= self.trying
            self.cycle, self.trial, self.full = self.cycle + 1, 0, []
        else:
            self.trial += 1
            self.units.scale(self.units.values(self.trying, 1 - self.trial / self.samples, 1))
        return True

    def _full(self, tensor: Tensor) -> Tensor:
        """A tensor of the model with its full weights, whatever is tried just now."""
        if not self.full:
            return tensor
        place = next(index for index, mine in enumerate(self.units.tensors) if mine is tensor)
        return self.full[place].to(tensor.device)

    def _put_back(self) -> None:
        for tensor, full in zip(self.units.tensors, self.full, strict=True):
            tensor.copy_(full)


def _shrink(optimizer: SparseOptimizer, at: int, steps: int) -> None:
    """Scale what is chosen and not zero yet in step `at` of so many; with the last one it is zero."""
    going = optimizer.chosen & ~optimizer.zero
    optimizer.units.scale(optimizer.units.values(going, (steps - at - 1) / (steps - at), 1))
    if at == steps - 1:
        optimizer.zero = optimizer.chosen.clone()


def saliency(units: Units, weights: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    """[units] what each is worth: the mean of five criteria, each divided by its norm over all units.

    With x a unit and g its gradient: |x|, |x| / size, cos(x, -g) + 1, |x'g| and (x'g)^2 / 2; the last two are the first
    terms of what the loss changes by without it.

    Args:
        units: of which the gradients are known.
        weights: what to take for the weights of a tensor; those it has by default.
    """
    norms = units.sums(lambda tensor: weights(tensor).square()).sqrt()
    slopes = units.sums(lambda tensor: None if tensor.grad is None else weights(tensor) * tensor.grad)
    gradients = units.sums(lambda tensor: None if tensor.grad is None else tensor.grad.square()).sqrt()
    cosine = slopes / (norms * gradients).clamp(min=_TINY)
    criteria = (norms, norms / units.sizes, 1 - cosine, slopes.abs(), slopes.square() / 2)
    return torch.stack([0.2 * one / one.norm().clamp(min=_TINY) for one in criteria]).sum(0)
