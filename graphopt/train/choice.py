"""Which units go: the lowest scores of all, within what each group may lose."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.train.units import Span, Units

__all__ = ["Quota"]


class Quota:
    """How many units are to go, and what each group may lose.

    Args:
        units: all of them.
        sparsity: the part of the units that goes; `goal` is the number nearest to it.
        step: what stays of a group is a multiple of it where the group has two of them at least; elsewhere any number.
            The goal is then missed by less than `step`.
        most: the largest part of a group that may go; one unit stays in any case.

    Raises:
        UsageError: for an argument out of its range, or a sparsity that the groups may not reach.
    """

    def __init__(self, units: Units, sparsity: float, step: int, most: float) -> None:
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity is {sparsity:g}, it has to be at least 0 and below 1")
        if not 0 < most <= 1:
            raise UsageError(f"most is {most:g}, it has to be above 0 and at most 1")
        if step < 1:
            raise UsageError(f"step is {step}, it has to be at least 1")
        self.units, self.step, self.most = units, step, most
        self.goal = int(sparsity * units.count + 0.5)
        reach = sum(int(cuts[-1]) if cuts.size else 0 for cuts in map(self._cuts, units.spans))
        if self.goal >= reach + step:
            raise UsageError(
                f"a sparsity of {sparsity:g} is {self.goal} of {units.count} units, and only {reach} may go",
                todo="raise most, lower step or ask for less",
            )

    def lowest(self, scores: Tensor, count: int) -> Tensor:
        """The units with the lowest scores [units], as a mask: `count` of them, or the next smaller number possible.

        A group loses a few units at once where its widths are multiples; they count as much as the best of them. What
        is chosen depends on the scores alone, so that processes with equal scores choose alike.
        """
        values, orders, keys, amounts, owners = scores.numpy(), [], [], [], []
        for number, span in enumerate(self.units.spans):
            mine, cuts = values[span.start : span.stop], self._cuts(span)
            order = np.argsort(mine, kind="stable")
            orders.append(order + span.start)
            keys.append(mine[order][cuts - 1])
            amounts.append(np.diff(cuts, prepend=0))
            owners.append(np.full(cuts.size, number))
        amount, owner = np.concatenate(amounts), np.concatenate(owners)
        rank = np.argsort(np.concatenate(keys), kind="stable")
        taken = rank[np.cumsum(amount[rank]) <= count]
        lost = np.bincount(owner[taken], weights=amount[taken], minlength=len(orders)).astype(np.int64)
        mask = np.zeros(self.units.count, dtype=bool)
        mask[np.concatenate([order[:number] for order, number in zip(orders, lost, strict=True)])] = True
        return torch.from_numpy(mask)

    def _cuts(self, span: Span) -> np.ndarray:
        """How many units a group may lose, none left out, ascending."""
        step = self.step if span.size >= 2 * self.step else 1
        most = min(span.size - 1, int(self.most * span.size + 1e-9))
        return np.arange(span.size % step or step, most + 1, step)
