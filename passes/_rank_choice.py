"""Choosing the ranks of all layers together, under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from graphopt.deployed import Deployed
from graphopt.model import Model
from graphopt.passes._rank_options import Option
from graphopt.passes._rank_prices import Price
from graphopt.solve import BudgetError, Choice, solve

__all__ = ["Chosen", "Planner", "Table", "least_error", "least_loss", "least_worst", "smallest_enough"]

Table: TypeAlias = Mapping[str, Sequence[Option]]
"""The options of every layer, by the name of its call."""
Chosen: TypeAlias = dict[str, Option]

_ROUNDS = 8
_ENOUGH = 0.95
"""Of a measured budget: when a plan that meets it uses enough of it."""


def least_loss(table: Table, budget: float, *, weights: Mapping[str, float]) -> Chosen:
    """Minimise the sum of errors, each times the weight of its layer: the multiple-choice knapsack, exactly.

    Raises:
        BudgetError: when the cheapest options cost more than the budget.
    """
    choices = [
        Choice(name, option, weights.get(name, 1.0) * option.error, option.cost)
        for name, options in table.items()
        for option in options
    ]
    return {choice.group: choice.option for choice in solve(choices, budget)}


def least_worst(table: Table, budget: float) -> Chosen:
    """Minimise the largest error of a layer, by bisection.

    Raises:
        BudgetError: when the cheapest options cost more than the budget.
    """

    def within(bound: float) -> Chosen:
        return {
            name: min((o for o in options if o.error <= bound), key=lambda option: option.cost)
            for name, options in table.items()
        }

    bounds = sorted({option.error for options in table.values() for option in options})
    low, high = 0, len(bounds) - 1
    if _cost(within(bounds[high])) > budget * (1 + 1e-9):
        raise BudgetError(f"a budget of {budget:.6g} cannot be met")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cost(within(bounds[middle])) <= budget else (middle + 1, high)
    return within(bounds[high])


def _cost(chosen: Chosen) -> float:
    return sum(option.cost for option in chosen.values())


class Planner:
    """Plans for a part of what the model costs; where that is measured, corrected by what plans are measured to reach.

    Attributes:
        reached: the part that the chosen plan reaches.

    Args:
        choose: from the options and a budget for them.
    """

    def __init__(self, table: Table, price: Price, choose: Callable[[Table, float], Chosen]) -> None:
        self.table, self.price, self.choose = table, price, choose
        self.fixed = price.whole - sum(options[0].cost for options in table.values())
        self.reached = 1.0
        self._part: Callable[[Chosen], float] | None = None

    def measure_by(self, deployed: Deployed, copy: Callable[[Chosen], Model]) -> None:
        """Judge plans by compiled models: `copy` makes the model of a plan."""
        self._part = lambda chosen: deployed.part(copy(chosen)) if any(o.form for o in chosen.values()) else 1.0

    def within(self, part: float) -> Chosen:
        """The plan that loses least within a part of the cost.

        Raises:
            BudgetError: when it cannot be reached, with the smallest part that can.
        """
        found = self._counted(part) if self._part is None else self._measured(part, self._part)
        if found is None:
            was = "can be" if self._part is None else "was measured"
            raise BudgetError(
                f"a part of {part:g} cannot be reached: {self.reached:.2g} is the smallest that {was}",
                why="layers whose factors would not be cheaper, and what is no layer, stay",
                todo="ask for less, allow more `forms`, or prune channels as well",
            )
        return found

    def _counted(self, part: float) -> Chosen | None:
        try:
            chosen = self.choose(self.table, part * self.price.whole - self.fixed)
        except BudgetError:
            self.reached = (self.fixed + _cost(self._cheapest())) / self.price.whole
            return None
        self.reached = (self.fixed + _cost(chosen)) / self.price.whole
        return chosen

    def _measured(self, part: float, measure: Callable[[Chosen], float]) -> Chosen | None:
        aim, low, high = part * self.price.whole, 0.0, self.price.whole
        best: tuple[float, Chosen] | None = None
        smallest = 1.0
        for _ in range(_ROUNDS):
            try:
                chosen = self.choose(self.table, aim - self.fixed)
            except BudgetError:
                chosen = self._cheapest()
            reached = measure(chosen)
            smallest = min(smallest, reached)
            if reached <= part and (best is None or reached > best[0]):
                best = reached, chosen
            if best is not None and best[0] >= _ENOUGH * part:
                break
            if reached > part and chosen == self._cheapest():
                break
            low, high = (low, aim) if reached > part else (aim, high)
            aim *= part / reached * (0.995 if reached > part else 1.0)
            if not low < aim < high:
                aim = (low + high) / 2
        self.reached = smallest if best is None else best[0]
        return None if best is None else best[1]

    def _cheapest(self) -> Chosen:
        return {name: min(options, key=lambda o: (o.cost, o.error)) for name, options in self.table.items()}


def smallest_enough(table: Table, kept: float) -> Chosen:
    """Of every layer the cheapest option that keeps a part of the energy of its outputs."""
    return {
        name: min((o for o in options if o.error <= 1 - kept), key=lambda option: option.cost)
        for name, options in table.items()
    }


def least_error(table: Table) -> Chosen:
    """Of every layer the nearest of its factorisations, of equals the cheapest; or the layer itself."""
    return {name: min(options[1:] or options, key=lambda o: (o.error, o.cost)) for name, options in table.items()}
