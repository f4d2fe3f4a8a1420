"""Choosing one option of every group under a budget, so that the least is lost: the multiple-choice knapsack."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.errors import UsageError

__all__ = ["BudgetError", "Choice", "solve"]

_GAP = 1e-4
"""How far from the best sum of losses a solution may be, relative to it: the losses are estimates themselves."""
_SECONDS = 20.0


class BudgetError(UsageError):
    """No choice is cheap enough."""


@dataclass(frozen=True)
class Choice:
    """One option of a group: 48 of 64 channels, these two layers merged, this layer at rank 96.

    Attributes:
        group: what it is an option of; exactly one of a group's options is taken.
        option: says to whoever made it what to do.
        loss: what it is estimated to lose; losses of different groups add up.
        cost: what is left to pay; costs add up to what the budget is compared with.
    """

    group: str
    option: Any = field(compare=False)
    loss: float
    cost: float


def solve(choices: Sequence[Choice], budget: float) -> list[Choice]:
    """One choice of every group, in order of the groups, with the least sum of losses whose sum of costs is within
    the budget. Solved as an integer program by HiGHS.

    Raises:
        BudgetError: when even the cheapest choices cost more; its `smallest` is what they cost.
        ValueError: for a loss or a cost that is no finite number.
    """
    for choice in choices:
        if not np.isfinite(choice.loss) or not np.isfinite(choice.cost):
            raise ValueError(
                f"option {choice.option} of '{choice.group}' has loss {choice.loss} and cost {choice.cost}"
            )
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(choice.group, []).append(choice)
    cheapest = [min(options, key=lambda one: (one.cost, one.loss)) for options in groups.values()]
    smallest = sum(one.cost for one in cheapest)
    if smallest > budget * (1 + 1e-9):
        raise BudgetError(f"a budget of {budget:.6g} cannot be met: the smallest reachable is {smallest:.6g}")
    useful = {name: _undominated(options) for name, options in groups.items()}
    if sum(options[0].cost for options in useful.values()) <= budget:
        return [options[0] for options in useful.values()]  # of each group the one that loses least
    found = _integer_program(useful, budget)
    return found if found is not None else cheapest


def _undominated(options: list[Choice]) -> list[Choice]:
    """By rising loss, without those that cost no less than one that loses no more."""
    kept: list[Choice] = []
    for one in sorted(options, key=lambda one: (one.loss, one.cost)):
        if not kept or one.cost < kept[-1].cost:
            kept.append(one)
    return kept


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS writes notes of its own to the process's stdout now and then, where nothing but data belongs."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _integer_program(groups: dict[str, list[Choice]], budget: float) -> list[Choice] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    listed = [(row, one) for row, options in enumerate(groups.values()) for one in options]
    losses, costs = np.array([one.loss for _, one in listed]), np.array([one.cost for _, one in listed])
    # Both are brought to a size of one: HiGHS works with absolute tolerances.
    losses, scale = losses / (np.abs(losses).max() or 1.0), budget or 1.0
    rows = np.array([row for row, _ in listed])
    one_each = coo_matrix((np.ones(len(listed)), (rows, np.arange(len(listed)))))
    with _silence():
        result = milp(
            losses,
            integrality=np.ones(len(listed)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs[None] / scale, -np.inf, budget / scale),
            ],
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if result.x is None:
        return None
    return [one for (_, one), taken in zip(listed, result.x, strict=True) if taken > 0.5]
