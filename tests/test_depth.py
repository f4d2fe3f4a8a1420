"""The dynamic programs of depth compression, against all plans."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from graphopt.depth import Piece, one_stage, two_stage
from graphopt.solve import BudgetError


def table(rng: random.Random, places: int, most: int = 3, sizes: int = 2) -> list[Piece]:
    """Whole numbers, so that sums are exact and ties are common; some pieces are missing."""
    pieces = [Piece(i, i + 1, rng.randint(3, 9), 0) for i in range(places)]
    for i, j in itertools.combinations(range(places + 1), 2):
        if j - i <= most:
            pieces += [
                Piece(i, j, rng.randint(1, 12), rng.randint(0, 9), k) for k in range(sizes) if rng.random() < 0.7
            ]
    rng.shuffle(pieces)
    return pieces


def plans(places: int, pieces: list[Piece], place: int = 0) -> Iterator[list[Piece]]:
    if place == places:
        yield []
    for piece in pieces:
        if piece.start == place:
            yield from ([piece, *rest] for rest in plans(places, pieces, piece.end))


def totals(plan: list[Piece]) -> tuple[float, float]:
    return sum(piece.loss for piece in plan), sum(piece.cost for piece in plan)


def test_one_stage_is_the_best_of_all_plans_in_200_tables() -> None:
    rng = random.Random(0)
    met = 0
    for _ in range(200):
        places = rng.randint(1, 5)
        pieces = table(rng, places)
        every = [totals(plan) for plan in plans(places, pieces)]
        budget = rng.randint(2, 8 * places)
        within = [one for one in every if one[1] <= budget]
        if not within:
            with pytest.raises(BudgetError, match=f"smallest reachable is {min(cost for _, cost in every):g}"):
                one_stage(places, pieces, budget)
            continue
        met += 1
        found = one_stage(places, pieces, budget)
        assert [piece.start for piece in found] == [0, *(piece.end for piece in found[:-1])]
        assert found[-1].end == places and totals(found) == min(within)
    assert met > 100


def two_stage_by_trying(
    places: int, costs: dict[tuple[int, int], float], losses: dict[tuple[int, int], float], budget: float
) -> tuple[float, float] | None:
    """Every set of activations that stay, and in it every set of cuts."""

    def ways(start: int, end: int) -> Iterator[list[int]]:
        inner = range(start + 1, end)
        for count in range(len(inner) + 1):
            yield from ([start, *middle, end] for middle in itertools.combinations(inner, count))

    best = None
    for kept in ways(0, places):
        stretches = list(itertools.pairwise(kept))
        if any(stretch not in losses for stretch in stretches):
            continue
        loss = sum(losses[stretch] for stretch in stretches)
        for cuts in itertools.product(*(list(ways(*stretch)) for stretch in stretches)):
            layers = [pair for cut in cuts for pair in itertools.pairwise(cut)]
            if all(pair in costs for pair in layers):
                cost = sum(costs[pair] for pair in layers)
                if cost <= budget and (best is None or (loss, cost) < best):
                    best = loss, cost
    return best


def test_two_stages_are_the_best_of_all_plans_in_200_tables() -> None:
    rng = random.Random(1)
    met = cut = 0
    for _ in range(200):
        places = rng.randint(1, 5)
        pairs = list(itertools.combinations(range(places + 1), 2))
        costs = {pair: float(rng.randint(1, 9)) for pair in pairs if rng.random() < 0.8 or pair[1] == pair[0] + 1}
        losses = {(i, j): float(rng.randint(0, 9) if j > i + 1 else 0) for i, j in pairs}
        budget = rng.randint(2, 5 * places)
        expected = two_stage_by_trying(places, costs, losses, budget)
        if expected is None:
            with pytest.raises(BudgetError):
                two_stage(places, costs, losses, budget)
            continue
        met += 1
        stretches = two_stage(places, costs, losses, budget)
        assert totals([layer for stretch in stretches for layer in stretch]) == expected
        assert all(costs[layer.start, layer.end] == layer.cost for stretch in stretches for layer in stretch)
        assert all(stretch[0].loss == losses[stretch[0].start, stretch[-1].end] for stretch in stretches)
        cut += any(len(stretch) > 1 for stretch in stretches)
    assert met > 100 and cut > 10


def test_sixty_layers_are_planned() -> None:
    rng = random.Random(2)
    pieces = [Piece(i, i + 1, 1 + rng.random(), 0.0) for i in range(60)]
    for i, j in itertools.combinations(range(61), 2):
        if 1 < j - i <= 6:
            pieces += [Piece(i, j, 0.5 + rng.random() * (j - i), rng.random() * (j - i), k) for k in range(3)]
    found = one_stage(60, pieces, 45.0)
    assert totals(found)[1] <= 45.0 and found[-1].end == 60
    # That what was thinned out is not much: a tenth of the budget less costs clearly more.
    assert totals(found)[0] < totals(one_stage(60, pieces, 40.5))[0]


def test_there_may_be_no_way_and_wrong_pieces_are_refused() -> None:
    with pytest.raises(BudgetError, match="no pieces lead"):
        one_stage(2, [Piece(0, 1, 1.0, 0.0)], 9.0)
    with pytest.raises(ValueError, match="from place 1 to 1"):
        one_stage(2, [Piece(1, 1, 1.0, 0.0)], 9.0)
    with pytest.raises(ValueError, match="cost -1"):
        one_stage(1, [Piece(0, 1, -1.0, 0.0)], 9.0)
    with pytest.raises(ValueError, match="loss nan"):
        one_stage(1, [Piece(0, 1, 1.0, float("nan"))], 9.0)
    assert one_stage(0, [], 1.0) == []
