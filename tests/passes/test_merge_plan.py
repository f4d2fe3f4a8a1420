"""The plan that loses least within a budget, where what a plan reaches is only known once it was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes._merge_plan import Goal, Plan, Planner
from graphopt.passes._merge_table import Candidate, Table
from graphopt.solve import BudgetError

Row = tuple[int, int, float, float]
"""Where a candidate starts and ends, what it costs and loses."""
ENOUGH = 0.95


class Measured:
    """A table, and a clock that says what plans of it reach by a function of their part of the cost by the table."""

    def __init__(self, layers: list[float], rows: list[Row], clock: Callable[[float], float] = lambda part: part):
        self.layers, self.clock = layers, clock
        self.candidates, self.losses = [], {}
        for number, (begin, end, cost, loss) in enumerate(rows):
            part: Any = SimpleNamespace(source=SimpleNamespace(name=begin), target=SimpleNamespace(name=end))
            one = Candidate(begin, end, part, number, cost, sum(layers[begin:end]))
            self.candidates.append(one)
            self.losses[one.label] = loss
        self.looked_at: list[float] = []

    def cost(self, chosen: tuple[Candidate, ...]) -> float:
        return sum(self.layers) - sum(one.apart - one.cost for one in chosen)

    def reached(self, chosen: tuple[Candidate, ...]) -> float:
        self.looked_at.append(self.cost(chosen) / sum(self.layers))
        return self.clock(self.looked_at[-1]) if chosen else 1.0

    def planner(self, *, two_stage: bool = False) -> Planner:
        table = SimpleNamespace(costs=[0.0, *self.layers], candidates=self.candidates)
        return Planner(cast(Table, table), self.losses, cast(Goal, self), two_stage=two_stage)

    def within(self, part: float) -> tuple[Plan, Plan | None]:
        planner = self.planner()
        return planner.within(part, ENOUGH), planner.beyond

    def best(self, part: float) -> float:
        """The least that any plan loses that is measured to keep a part, looked at one by one."""
        found = []
        for count in range(len(self.candidates) + 1):
            for chosen in itertools.combinations(self.candidates, count):
                apart = all(a.end <= b.start for a, b in itertools.pairwise(chosen))
                if apart and chosen and self.clock(self.cost(chosen) / sum(self.layers)) <= part:
                    found.append(sum(self.losses[one.label] for one in chosen))
        return min(found)


VGG = [(0, 2, 59.7, 0.039), (0, 2, 51.4, 0.1165), (0, 2, 41.9, 0.1724), (0, 2, 29.0, 0.3467), (0, 2, 23.1, 0.4499)]
"""Of 100: the parts of its latency by the table, and losses, of the best plans of a small VGG."""


def test_of_coarse_plans_the_one_that_keeps_the_budget_is_taken_and_the_next_one_named() -> None:
    """The whole takes a little more than the table says: 0.606 of a plan that is 0.597 by it."""
    table = Measured([50.0, 50.0], VGG, lambda part: part + 0.009)
    plan, beyond = table.within(0.6)
    assert (plan.reached, plan.loss) == (pytest.approx(0.523), 0.1165) and beyond is not None
    assert (beyond.reached, beyond.loss) == (pytest.approx(0.606), 0.039)
    assert table.looked_at == pytest.approx([0.597, 0.514])  # and nothing twice
    plan, beyond = table.within(0.61)
    assert plan.loss == 0.039 and beyond is None  # nearly all of it is used
    plan, beyond = table.within(0.8)
    assert plan.loss == 0.039 and beyond is not None
    assert (beyond.chosen, beyond.reached, beyond.loss) == ((), 1.0, 0.0)  # nothing but the net as it is


def test_after_plans_that_were_too_small_it_goes_back_up() -> None:
    """What is saved by the table is saved once and a half: the first plan is far below the budget."""
    table = Measured([50.0, 50.0], VGG, lambda part: 1 - 1.5 * (1 - part))
    plan, beyond = table.within(0.45)
    assert table.looked_at == pytest.approx([0.419, 0.597])
    assert (plan.reached, plan.loss) == (pytest.approx(0.3955), 0.039) and beyond is not None and beyond.chosen == ()


def test_after_one_too_large_and_one_too_small_those_between_are_looked_at() -> None:
    steps = {0.597: 0.7, 0.514: 0.63, 0.419: 0.52, 0.29: 0.3, 0.231: 0.25}
    table = Measured([50.0, 50.0], VGG, lambda part: steps[round(part, 3)])
    plan, beyond = table.within(0.6)
    assert (plan.reached, plan.loss) == (0.52, 0.1724) and beyond is not None and beyond.reached == 0.63


def test_below_the_smallest_there_is_none() -> None:
    table = Measured([50.0, 50.0], VGG)
    with pytest.raises(BudgetError, match=r"0\.2 cannot be reached: 0\.23 is the smallest"):
        table.within(0.2)
    assert table.looked_at == pytest.approx([0.231])
    assert table.planner(two_stage=True).within(0.24, ENOUGH).loss == 0.4499


@st.composite
def measured(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Measured:
    """A chain of up to five layers with candidates of any cost, on a machine with a start for every plan, and where a
    part of the cost counts more or less than by the table."""
    layers = draw(st.lists(st.integers(5, 50).map(float), min_size=2, max_size=5))
    rows: list[Row] = []
    for begin, end in itertools.combinations(range(len(layers) + 1), 2):
        if end - begin > 1:
            part, loss = draw(st.floats(0.1, 0.95)), draw(st.floats(0.01, 1.0))
            rows.append((begin, end, part * sum(layers[begin:end]), loss))
    begin, power = draw(st.floats(0, 0.3)), draw(st.floats(0.5, 2))
    return Measured(layers, rows, lambda part: begin + (1 - begin) * part**power)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(measured(), st.floats(0.2, 0.95))
def test_no_plan_that_keeps_the_budget_loses_less_unless_nearly_all_of_it_is_used(table: Measured, part: float) -> None:
    try:
        plan, beyond = table.within(part)
    except BudgetError:
        with pytest.raises(ValueError, match="empty"):
            table.best(part)
        return
    assert plan.reached <= part and len(table.looked_at) == len(set(table.looked_at)) <= 10
    if beyond is None:
        assert plan.reached >= ENOUGH * part
    else:
        assert plan.loss == pytest.approx(table.best(part)) and beyond.reached > part
