"""Which regions become one convolution each: by the tables, corrected by what plans are measured to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.analysis.widths import layer_macs
from graphopt.deployed import Deployed
from graphopt.depth import Piece, one_stage, two_stage
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.passes._linearise import start
from graphopt.passes._merge_table import Candidate, Replacement, Table
from graphopt.rewriter import Rewriter
from graphopt.solve import BudgetError

__all__ = ["Goal", "Plan", "Planner"]

_ROUNDS = 10
"""Plans that are compiled and measured at most."""


class Goal:
    """What of the original's cost a model reaches: multiply-accumulates, or measured seconds of compiled code."""

    def __init__(self, original: Model, watch: Stopwatch | None) -> None:
        self.original = original
        self.deployed = None if watch is None else Deployed(original, watch)

    def reached(self, chosen: tuple[Candidate, ...]) -> float:
        if not chosen:
            return 1.0
        copy = self.original.clone(share_tensors=True)
        rw = Rewriter(copy)
        replacement = Replacement(rw)
        for one in chosen:
            part = replacement.region(one)
            replacement.replace(part, start(rw, part, one.size))
        copy.touch()
        if self.deployed is None:
            return sum(layer_macs(copy).values()) / sum(layer_macs(self.original).values())
        return self.deployed.part(copy)


@dataclass(frozen=True)
class Plan:
    """What becomes one convolution, in the order of the graph.

    Attributes:
        cost: by the table, in its unit.
        loss: the sum of what each of them loses.
        reached: the part of the original's cost that is left, measured.
    """

    chosen: tuple[Candidate, ...]
    cost: float
    loss: float
    reached: float


class Planner:
    """Plans by the tables, corrected by what the plans are measured to reach.

    Attributes:
        beyond: the least that was measured above the budget, at most the original; after `within`, and None if that
            left little of the budget unused.
    """

    def __init__(self, table: Table, losses: Mapping[str, float], goal: Goal, *, two_stage: bool) -> None:
        self.table, self.losses, self.goal, self.two_stage = table, losses, goal, two_stage
        self.beyond: Plan | None = None

    def within(self, part: float, enough: float) -> Plan:
        """The plan that loses least among those that keep the budget.

        Of the plans that no other one beats by the tables, a dearer one loses less. So the dearest that keeps the
        budget is looked for, between one that does and one that does not, until there is no other between them, or
        `enough` of the budget is used.

        Raises:
            BudgetError: when there is none.
        """
        whole = sum(self.table.costs)
        under: Plan | None = None
        over = Plan((), whole, 0.0, 1.0)
        smallest, aim = 1.0, part * whole
        for _ in range(_ROUNDS):
            chosen = self._between(under, aim, over)
            if chosen is None:
                break
            plan = self._plan(chosen, self.goal.reached(chosen))
            smallest = min(smallest, plan.reached)
            if plan.reached > part:
                over = plan
            else:
                under = plan
                if plan.reached >= enough * part:
                    return plan
            aim = plan.cost * part * (1 + enough) / 2 / plan.reached  # the middle of what is good enough
            least = 0.0 if under is None else under.cost
            if not least < aim < over.cost:
                aim = (least + over.cost) / 2
        if under is None:
            raise BudgetError(
                f"a part of {part:g} cannot be reached: {smallest:.2g} is the smallest that was",
                why="layers that cannot become one, or would not be cheaper, stay",
                todo="ask for less, raise `largest` or `longest`, or prune channels as well",
            )
        self.beyond = over
        return under

    def _between(self, under: Plan | None, aim: float, over: Plan) -> tuple[Candidate, ...] | None:
        """A plan for about the cost of `aim`, cheaper than `over`, and dearer than `under`; None if there is none."""
        known = [plan.chosen for plan in (under, over) if plan is not None]
        for cost in (aim, (aim + over.cost) / 2, over.cost * (1 - 1e-9)):
            try:
                chosen = self._chosen(cost)
            except BudgetError:
                chosen = self._cheapest()
            if chosen not in known:
                return chosen
        return None

    def _plan(self, chosen: tuple[Candidate, ...], reached: float) -> Plan:
        saved = sum(one.apart - one.cost for one in chosen)
        loss = sum(self.losses[one.label] for one in chosen)
        return Plan(chosen, sum(self.table.costs) - saved, loss, reached)

    def _cheapest(self) -> tuple[Candidate, ...]:
        pieces = [Piece(p.start, p.end, 0.0, p.cost, p.option) for p in self._pieces()]
        return _merged(one_stage(len(self.table.costs) - 1, pieces, 1.0))

    def _chosen(self, aim: float) -> tuple[Candidate, ...]:
        places = len(self.table.costs) - 1
        if not self.two_stage:
            return _merged(one_stage(places, self._pieces(), aim))
        whole: dict[tuple[int, int], Candidate] = {(one.start, one.end): one for one in self.table.candidates}
        costs = {(i, i + 1): self.table.costs[i + 1] for i in range(places)} | {k: one.cost for k, one in whole.items()}
        losses = {(i, i + 1): 0.0 for i in range(places)} | {k: self.losses[one.label] for k, one in whole.items()}
        stretches = two_stage(places, costs, losses, aim)
        return tuple(
            whole[piece.start, piece.end] for one in stretches for piece in one if (piece.start, piece.end) in whole
        )

    def _pieces(self) -> list[Piece]:
        kept = [Piece(place, place + 1, cost, 0.0) for place, cost in enumerate(self.table.costs[1:])]
        return kept + [Piece(c.start, c.end, c.cost, self.losses[c.label], c) for c in self.table.candidates]


def _merged(plan: list[Piece]) -> tuple[Candidate, ...]:
    return tuple(piece.option for piece in plan if piece.option is not None)
