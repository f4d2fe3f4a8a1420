"""Choosing which layers of a chain become one, so that the least is lost within a budget: dynamic programs.

A chain has places 0 to n, the values between its layers. A `Piece` is one layer that takes the value at one place to
that at a later one; a plan is pieces that follow each other from 0 to n. Both programs are exact for the tables they
are given, and do not discretise time: they keep every partial plan that no other one beats in cost and in loss.

`one_stage` takes a table of pieces with what each loses and costs (LayerMerge: Kim et al., LayerMerge: Neural Network
Depth Compression through Layer Pruning and Merging, ICML 2024, with a piece for every kernel size). `two_stage` has the
losses of making a stretch linear apart from the costs of the layers that a linear stretch is cut into (Kim et al.,
Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming, ICML 2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.solve import BudgetError

__all__ = ["Piece", "one_stage", "two_stage"]

_MOST = 20_000
"""Partial plans kept at a place; of more, the best one of each of as many equal parts of the budget."""


@dataclass(frozen=True)
class Piece:
    """One layer for what is between two places.

    Attributes:
        option: says to whoever made it what to do.
    """

    start: int
    end: int
    cost: float
    loss: float
    option: Any = field(default=None, compare=False)


@dataclass
class _Front:
    """Partial plans that end at a place, by rising cost and falling loss: the piece that each ends with, and which plan
    at that piece's start it goes on from."""

    cost: np.ndarray
    loss: np.ndarray
    piece: np.ndarray
    before: np.ndarray


def one_stage(places: int, pieces: Sequence[Piece], budget: float) -> list[Piece]:
    """The pieces from place 0 to place `places` with the least sum of losses whose costs sum up to the budget at most;
    of equal losses the cheapest.

    Raises:
        BudgetError: when even the cheapest cost more, saying what they cost; or when there is no way through.
        ValueError: for a piece that leads backwards, or with a cost or loss that is no finite number, or a negative
            cost.
    """
    _check(places, pieces)
    empty = np.zeros(0, dtype=np.int64)
    fronts = [_Front(np.zeros(1), np.zeros(1), np.full(1, -1), np.full(1, -1))]
    cheapest = [0.0]
    ending: list[list[int]] = [[] for _ in range(places + 1)]
    for number, piece in enumerate(pieces):
        ending[piece.end].append(number)
    for place in range(1, places + 1):
        cheapest.append(min((cheapest[pieces[i].start] + pieces[i].cost for i in ending[place]), default=np.inf))
        parts = [_extended(fronts[pieces[i].start], pieces[i], i, budget) for i in ending[place]]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [empty] * 4
        fronts.append(_undominated(_Front(*columns), budget))
    if cheapest[-1] == np.inf:
        raise BudgetError("no pieces lead from the first place to the last")
    if not len(fronts[-1].cost):
        raise BudgetError(f"a budget of {budget:.6g} cannot be met: the smallest reachable is {cheapest[-1]:.6g}")
    return _traced(fronts, pieces)


def _check(places: int, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if not 0 <= piece.start < piece.end <= places:
            raise ValueError(f"a piece leads from place {piece.start} to {piece.end}, there are 0 to {places}")
        if not np.isfinite(piece.loss) or not np.isfinite(piece.cost) or piece.cost < 0:
            raise ValueError(f"the piece {piece.start} to {piece.end} has loss {piece.loss} and cost {piece.cost}")


def _extended(front: _Front, piece: Piece, number: int, budget: float) -> tuple[np.ndarray, ...]:
    cost = front.cost + piece.cost
    fits = np.flatnonzero(cost <= budget * (1 + 1e-12))
    return cost[fits], front.loss[fits] + piece.loss, np.full(len(fits), number), fits


def _undominated(plans: _Front, budget: float) -> _Front:
    cost, loss = plans.cost, plans.loss
    order = np.lexsort((loss, cost))
    falls = np.ones(len(order), dtype=bool)
    falls[1:] = loss[order][1:] < np.minimum.accumulate(loss[order])[:-1]
    kept = order[falls]
    if len(kept) > _MOST:  # within a part of the budget the last one loses least
        part = (cost[kept] / budget * _MOST).astype(np.int64)
        kept = kept[np.append(part[1:] != part[:-1], True)]
    return _Front(cost[kept], loss[kept], plans.piece[kept], plans.before[kept])


def _traced(fronts: Sequence[_Front], pieces: Sequence[Piece]) -> list[Piece]:
    place, at = len(fronts) - 1, len(fronts[-1].cost) - 1  # the last one loses least
    found: list[Piece] = []
    while place:
        front = fronts[place]
        piece = pieces[int(front.piece[at])]
        found.append(piece)
        place, at = piece.start, int(front.before[at])
    return found[::-1]


def two_stage(
    places: int, costs: Mapping[tuple[int, int], float], losses: Mapping[tuple[int, int], float], budget: float
) -> list[list[Piece]]:
    """The stretches that become linear, each as the cheapest layers that it can be cut into.

    Args:
        costs: of the one layer for what is between two places, where it can be one.
        losses: of making linear all that is strictly between two places, whose own activations stay.

    Returns:
        For every stretch its layers; the loss of the stretch is with its first one.

    Raises:
        BudgetError: as `one_stage`.
        ValueError: as `one_stage`.
    """
    _check(places, [Piece(start, end, cost, 0.0) for (start, end), cost in costs.items()])
    cuts = _cheapest_cuts(places, costs)
    stretches = [Piece(*ends, cuts[ends][0], loss, cuts[ends][1]) for ends, loss in losses.items() if ends in cuts]
    found = []
    for stretch in one_stage(places, stretches, budget):
        at = [stretch.start, *stretch.option, stretch.end]
        layers = [Piece(i, j, costs[i, j], 0.0) for i, j in itertools.pairwise(at)]
        found.append([Piece(layers[0].start, layers[0].end, layers[0].cost, stretch.loss), *layers[1:]])
    return found


def _cheapest_cuts(
    places: int, costs: Mapping[tuple[int, int], float]
) -> dict[tuple[int, int], tuple[float, tuple[int, ...]]]:
    """For every stretch that layers can make up, the least that they cost, and the places between them."""
    found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
    for start in range(places):
        for end in range(start + 1, places + 1):
            options: list[tuple[float, tuple[int, ...]]] = []
            if (start, end) in costs:
                options.append((costs[start, end], ()))
            options += [
                (found[start, middle][0] + costs[middle, end], (*found[start, middle][1], middle))
                for middle in range(start + 1, end)
                if (start, middle) in found and (middle, end) in costs
            ]
            if options:
                found[start, end] = min(options)
    return found
