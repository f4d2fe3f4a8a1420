"""Which widths meet a budget: ladders of widths for every group, and the solver that picks a rung of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphopt.analysis.coupling import Coupling, Group
from graphopt.analysis.removal import Conflict
from graphopt.passes._budget import Budget
from graphopt.passes._cutting import cut_copy
from graphopt.passes._importance import Importance
from graphopt.solve import BudgetError, Choice, solve

__all__ = ["Plan", "Width", "classes_of", "without_gaps"]

_LADDER = 32
"""How many widths of a group are looked at, beside its own."""
_ROUNDS = 8
_LEAST = 1e-9
"""What is left of a group at least, so that a group whose other units are worth nothing has a loss."""


@dataclass(frozen=True)
class Width:
    """A way to make a group narrower: the least important units of one of its families go; the least of all first."""

    group: Group
    family: int
    units: tuple[int, ...]

    @property
    def classes(self) -> list[int]:
        return [c for unit in self.units for c in self.group.families[self.family][unit]]


class Plan:
    """The search for widths that meet a budget. `refused` are the groups that turned out not to be cut, and why."""

    def __init__(
        self,
        coupling: Coupling,
        budget: Budget,
        importance: Importance,
        groups: Sequence[Group],
        *,
        most: Mapping[str, float],
        step: int | None,
    ) -> None:
        budget.start(coupling)
        self.coupling, self.budget, self.most = coupling, budget, most
        self.step = budget.step if step is None else step
        self.refused: dict[str, str] = {}
        self.ladders = [self._ladder(group, importance) for group in groups]

    def widths(self) -> list[Width]:
        """Widths at which no more is left than the budget allows.

        Raises:
            BudgetError: when there are none.
        """
        wanted = self.budget.part * self.budget.before
        aim = self.budget.part * self.budget.whole
        best: tuple[float, list[Width]] | None = None
        smallest = self.budget.before
        for _ in range(_ROUNDS):
            chosen = self._solved(aim)
            reached = self._reached(chosen)
            if reached is None:
                continue
            smallest = min(smallest, reached)
            if reached <= wanted and (best is None or reached > best[0]):
                best = reached, chosen
            if best is not None and (best[0] >= self.budget.enough * wanted or not classes_of(best[1])):
                break
            if reached > wanted and classes_of(chosen) == classes_of(without_gaps(self.coupling, self._narrowest())):
                break
            aim *= wanted * (1 + self.budget.enough) / 2 / reached  # the middle of what is good enough
        if best is None:
            raise self._unreachable(smallest / self.budget.before)
        self.achieved = best[0] / self.budget.before
        return best[1]

    def _ladder(self, group: Group, importance: Importance) -> list[tuple[Width, float]]:
        """Widths of a group with what each loses, for all its families.

        With S the sum of all scores and L that of the units that go, -S log(1 - L / S): L while that is little, and
        beyond all bounds as nothing is left to say it with. Of layers in a row each passes on a part 1 - L / S, and the
        logarithms of the parts add up.
        """
        found = []
        for family, units in enumerate(group.families):
            scores = importance.scores(group, family)
            total = float(scores.sum()) or 1.0
            order = np.argsort(scores, kind="stable")
            part = np.concatenate(([0.0], np.cumsum(scores[order]) / total))
            lost = -np.log(np.maximum(1 - part, _LEAST)) * (total if importance.comparable else 1.0)
            for count in self._counts(len(units), self.most[group.name]):
                found.append((Width(group, family, tuple(order[:count].tolist())), float(lost[count])))
        return found

    def _counts(self, size: int, part: float) -> list[int]:
        """How many units to remove: none, and then in even steps up to a part of them."""
        step = self.step
        while step > 1 and size < 2 * step:
            step //= 2
        most = min(size - 1, int(part * size))
        kept = {_multiple(size * (1 - i / _LADDER), step) for i in range(1, _LADDER)} | {_multiple(size - most, step)}
        return [0, *sorted({size - width for width in kept if 0 < size - width <= most})]

    def _solved(self, aim: float) -> list[Width]:
        """Widths for a cost of `aim` by the model of costs, which is brought to agree with itself."""
        removed: list[int] = []
        chosen: list[Width] = []
        for _ in range(_ROUNDS):
            offered = [self.choices(ladder, removed) for ladder in self.ladders]
            fixed = self.budget.widths.total - sum(max(choice.cost for choice in choices) for choices in offered)
            try:
                solution = solve([choice for choices in offered for choice in choices], aim - fixed)
                chosen = [choice.option for choice in solution]
            except BudgetError:
                chosen = self._narrowest()
            now = [c for width in chosen for c in width.classes]
            if set(now) == set(removed):
                break
            removed = now
        return without_gaps(self.coupling, chosen)

    def choices(self, ladder: list[tuple[Width, float]], removed: Sequence[int]) -> list[Choice]:
        """The widths of a ladder as options, if `removed` is about what will be removed in all."""
        group = ladder[0][0].group
        saved = [self.budget.widths.savings(family, removed) for family in group.families]
        amounts = [float(saved[width.family][list(width.units)].sum()) for width, _ in ladder]
        return [
            Choice(group.name, width, loss, max(amounts) - amount)
            for (width, loss), amount in zip(ladder, amounts, strict=True)
        ]

    def _narrowest(self) -> list[Width]:
        return [max(ladder, key=lambda pair: len(pair[0].classes))[0] for ladder in self.ladders]

    def _reached(self, widths: list[Width]) -> float | None:
        """The cost of the model with these widths, cut for the purpose; None where some group cannot be cut like that,
        which is then left out of the ladders."""
        if not classes_of(widths) and self.coupling.model is self.budget.original:
            return self.budget.before  # to measure that would only measure noise
        try:
            return self.budget.reached(cut_copy(self.coupling, classes_of(widths)))
        except Conflict as conflict:
            alone = {width.group.name: why for width in widths if (why := self._conflict(width)) is not None}
            if not alone:
                raise
            self.refused |= alone
            self.ladders = [ladder for ladder in self.ladders if ladder[0][0].group.name not in alone]
            if not self.ladders:
                raise conflict
            return None

    def _conflict(self, width: Width) -> str | None:
        try:
            cut_copy(self.coupling, width.classes)
        except Conflict as conflict:
            return f"{conflict.what}, at {conflict.where}"
        return None

    def _unreachable(self, smallest: float) -> BudgetError:
        return BudgetError(
            f"{self.budget.name}={self.budget.part:g} cannot be met: {smallest:.2g} is the smallest that was reached",
            why=f"at most {max(self.most.values(), default=0):g} of a group may go, and what is pinned stays",
            todo="ask for less, or raise `most` or `limits`; `graphopt groups` shows what can be removed",
        )


def without_gaps(coupling: Coupling, widths: Sequence[Width]) -> list[Width]:
    """Widths that leave something of every tensor: of what would vanish, the most important unit stays."""
    found = list(widths)
    removed = np.zeros(coupling.classes.count, dtype=bool)
    removed[classes_of(found)] = True
    while emptied := coupling.rectangles.emptied(removed):
        classes = set(emptied[0][1].tolist())
        for place, width in enumerate(found):
            units = width.group.families[width.family]
            inside = [unit for unit in width.units if classes.intersection(units[unit])]
            if inside:
                found[place] = replace(width, units=tuple(unit for unit in width.units if unit != inside[-1]))
                removed[list(units[inside[-1]])] = False
                break
    return found


def _multiple(width: float, step: int) -> int:
    """The multiple of a step that is nearest to a width, at least one."""
    return max(step, round(width / step) * step)


def classes_of(widths: Sequence[Width]) -> list[int]:
    """All classes that go."""
    return [c for width in widths for c in width.classes]
