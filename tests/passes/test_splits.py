"""Which shares of one budget several passes get."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.passes._splits import SHARES, Split, best_split, goals, splits

ALL = {ways: list(splits(ways)) for ways in (1, 2, 3)}


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_all_splits_give_all_shares(ways: int) -> None:
    expected = [split for split in itertools.product(range(SHARES + 1), repeat=ways) if sum(split) == SHARES]
    assert sorted(ALL[ways]) == sorted(expected)


def test_what_is_left_after_each_way_falls_to_the_budget() -> None:
    assert goals((1, 0, 3), 0.0625) == pytest.approx((0.5, 0.5, 0.0625))
    assert goals((4,), 0.3) == pytest.approx((0.3,))


@given(st.integers(1, 3), st.integers(0, 14))
def test_where_losses_rise_with_the_distance_from_one_split_that_one_is_found(ways: int, place: int) -> None:
    wanted = ALL[ways][place % len(ALL[ways])]

    def distance(split: Split) -> float:
        return float(sum(abs(a - b) for a, b in zip(split, wanted, strict=True)))

    assert best_split(ways, distance) == wanted


@given(st.integers(2, 3), st.data())
def test_nothing_beside_the_result_loses_less_nor_any_way_alone(ways: int, data: st.DataObject) -> None:
    losses = {split: data.draw(st.sampled_from([0.1, 0.2, 0.3, 0.5, math.inf])) for split in ALL[ways]}
    asked: list[Split] = []

    def loss(split: Split) -> float:
        asked.append(split)
        return losses[split]

    found = best_split(ways, loss)
    if found is None:
        assert all(math.isinf(loss) for loss in losses.values())
        return
    beside = [
        split for split in ALL[ways] if sum(abs(a - b) for a, b in zip(split, found, strict=True)) == 2
    ]  # one share moved
    alone = [split for split in ALL[ways] if max(split) == SHARES]
    if any(math.isfinite(losses[split]) for split in alone):
        assert losses[found] <= min(losses[split] for split in (*beside, *alone))
    else:
        assert losses[found] == min(losses.values())
    assert len(asked) == len(set(asked)), "what was done once is not done again"


def test_one_way_that_cannot_do_it_is_refused() -> None:
    assert best_split(1, lambda split: math.inf) is None
