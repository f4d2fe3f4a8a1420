"""Narrower groups or fewer branches: which branches the plan that loses least is without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.analysis.branches import Branch
from graphopt.analysis.coupling import Group
from graphopt.passes._plan import Plan, Width
from graphopt.rewriter import Node
from graphopt.solve import BudgetError, Choice, solve

__all__ = ["Tradeoff"]

_ROUNDS = 4
_MOST_OPTIONS = 48
"""How many ways to narrow what is in a branch are looked at."""


@dataclass(frozen=True)
class _Option:
    """Something that can be done: widths of groups and branches to erase, what it loses, and what it saves."""

    what: tuple[Width | Branch, ...]
    loss: float
    saved: float


class Tradeoff:
    """The choice between narrower groups and branches that go.

    A group belongs to the innermost branch that all its layers are in. What is in a branch, groups and other branches,
    is combined to ways to narrow it, and to erase it is one more.

    Args:
        plan: of channels alone; its budget has looked at the whole model last.
        losses: of each branch that may go, the square of the relative error without it.
    """

    def __init__(self, plan: Plan, losses: Mapping[Branch, float]) -> None:
        self.plan, self.losses = plan, losses
        self._innermost: dict[Node, Branch] = {}
        self._parent: dict[Branch, Branch | None] = {}
        for branch in sorted(losses, key=lambda one: -len(one.nodes)):
            self._parent[branch] = self._innermost.get(branch.add)
            self._innermost |= dict.fromkeys(branch.nodes, branch)
        amounts = plan.budget.amounts
        self._costs = {branch: sum(amounts.get(node, 0.0) for node in branch.nodes) for branch in losses}
        self._homes = {ladder[0][0].group.name: self.home(ladder[0][0].group) for ladder in plan.ladders}

    def home(self, group: Group) -> Branch | None:
        """The innermost branch that all layers of a group are in."""
        first, *others = {member.slot.user: None for member in group.members}
        around = [set(self._outwards(self._innermost.get(node))) for node in others]
        outwards = self._outwards(self._innermost.get(first))
        return next((branch for branch in outwards if all(branch in one for one in around)), None)

    def _outwards(self, branch: Branch | None) -> Iterator[Branch]:
        while branch is not None:
            yield branch
            branch = self._parent[branch]

    def chosen(self) -> list[Branch]:
        """The branches that the plan which loses least is without, in order; none where no plan is cheap enough."""
        removed: list[int] = []
        chosen: list[Branch] = []
        for _ in range(_ROUNDS):
            offered = self._offered(removed)
            most = [max(option.saved for option in options) for options in offered]
            choices = [
                Choice(str(place), option, option.loss, best - option.saved)
                for place, (options, best) in enumerate(zip(offered, most, strict=True))
                for option in options
            ]
            budget = self.plan.budget
            try:
                solution = solve(choices, budget.part * budget.whole - (budget.whole - sum(most)))
            except BudgetError:
                return chosen
            taken = [one for choice in solution for one in choice.option.what]
            chosen = [branch for branch in self.losses if branch in taken]
            now = [c for one in taken for c in self._classes(one)]
            if set(now) == set(removed):
                break
            removed = now
        return chosen

    def _classes(self, one: Width | Branch) -> list[int]:
        """What vanishes; with a branch all that lives in it."""
        if isinstance(one, Width):
            return one.classes
        groups = [ladder[0][0].group for ladder in self.plan.ladders]
        inside = [group for group in groups if one in self._outwards(self._homes[group.name])]
        return [c for group in inside for family in group.families for unit in family for c in unit]

    def _offered(self, removed: Sequence[int]) -> list[list[_Option]]:
        """The options of every group that is in no branch, and of every branch that is in no other."""
        parts: dict[Branch | None, list[list[_Option]]] = {None: [], **{branch: [] for branch in self.losses}}
        for ladder in self.plan.ladders:
            choices = self.plan.choices(ladder, removed)
            dearest = max(choice.cost for choice in choices)
            options = [_Option((choice.option,), choice.loss, dearest - choice.cost) for choice in choices]
            parts[self._homes[ladder[0][0].group.name]].append(options)
        for branch in sorted(self.losses, key=lambda one: len(one.nodes)):  # those inside come before those around
            ways, whole = _combined(parts[branch]), self._costs[branch]
            kept = [_Option(way.what, way.loss, min(way.saved, whole)) for way in ways]
            erased = _Option((branch,), self.losses[branch], whole)  # the first of those that are as good
            parts[self._parent[branch]].append([erased, *kept])
        return parts[None]


def _combined(parts: Sequence[Sequence[_Option]]) -> list[_Option]:
    """Ways to take one option of each; those that lose no more and save as much as another stand for it."""
    found = [_Option((), 0.0, 0.0)]
    for options in parts:
        pairs = [_Option(a.what + b.what, a.loss + b.loss, a.saved + b.saved) for a in found for b in options]
        found = []
        for option in sorted(pairs, key=lambda one: (one.loss, -one.saved)):
            if not found or option.saved > found[-1].saved:
                found.append(option)
        if len(found) > _MOST_OPTIONS:
            found = [found[place] for place in np.linspace(0, len(found) - 1, _MOST_OPTIONS).astype(int)]
    return found
