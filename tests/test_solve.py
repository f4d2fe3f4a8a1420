"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.solve import BudgetError, Choice, solve

numbers = st.integers(0, 50).map(lambda n: n / 10)
groups = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)


def choices(table: list[list[tuple[float, float]]]) -> list[Choice]:
    return [
        Choice(f"g{i}", option, loss, cost) for i, row in enumerate(table) for option, (loss, cost) in enumerate(row)
    ]


@settings(max_examples=200, deadline=None)
@given(groups, st.floats(0, 1))
def test_best_within_the_budget(table: list[list[tuple[float, float]]], part: float) -> None:
    cheapest = sum(min(cost for _, cost in row) for row in table)
    dearest = sum(max(cost for _, cost in row) for row in table)
    budget = cheapest + part * (dearest - cheapest)
    found = solve(choices(table), budget)
    assert [one.group for one in found] == [f"g{i}" for i in range(len(table))]
    assert sum(one.cost for one in found) <= budget + 1e-6
    every = list(itertools.product(*table))
    best = min(sum(loss for loss, _ in c) for c in every if sum(cost for _, cost in c) <= budget + 1e-9)
    assert sum(one.loss for one in found) <= best + 1e-3


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match="smallest reachable is 3"):
        solve(choices([[(0, 5), (1, 2)], [(0, 4), (1, 1)]]), 2.5)
    assert [one.option for one in solve(choices([[(0, 5), (1, 2)], [(0, 4), (1, 1)]]), 3)] == [1, 1]


def test_no_budget_takes_the_least_loss() -> None:
    assert [one.option for one in solve(choices([[(3, 1), (1, 5)], [(2, 1), (0, 9)]]), 100)] == [1, 1]


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="loss nan"):
        solve([Choice("a", 0, float("nan"), 1.0)], 5)


def test_nothing_is_written_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    table = [[(k**1.5 * (1 + i % 3), 40.0 - k * (1 + i % 5)) for k in range(8)] for i in range(40)]
    solve(choices(table), 1000.0)
    assert capfd.readouterr().out == ""
