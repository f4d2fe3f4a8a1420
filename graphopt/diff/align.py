"""The longest common subsequence of two lists of nodes, weighted by how alike they are; near-linear for long lists."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

__all__ = ["align", "increasing"]

_CELLS = 40_000
"""Two lists whose lengths multiply to this are compared cell by cell; longer ones are first cut at what is unique."""
_CANDIDATES = 4

Score = Callable[[int, int], int]
"""How alike an item of either list is; zero for two that cannot be a pair."""


def align(
    a: Sequence[int], b: Sequence[int], score: Score, keys: Sequence[tuple[Sequence[Hashable], Sequence[Hashable]]]
) -> list[tuple[int, int]]:
    """Pairs of items in the same order in both lists.

    Args:
        keys: labels by item number for `a` and for `b`, the most telling first: what is unique under one cuts long
            lists. The last says which items may be a pair at all.
    """
    pairs: list[tuple[int, int]] = []
    stack = [(0, len(a), 0, len(b), 0)]
    while stack:
        first_a, end_a, first_b, end_b, level = stack.pop()
        part_a, part_b = a[first_a:end_a], b[first_b:end_b]
        if not part_a or not part_b:
            continue
        if len(part_a) * len(part_b) <= _CELLS:
            pairs += _by_cells(part_a, part_b, score)
            continue
        if level == len(keys):
            pairs += _by_nearest(part_a, part_b, keys[-1])
            continue
        cuts = _unique(part_a, part_b, keys[level])
        places = [(-1, -1), *cuts, (len(part_a), len(part_b))]
        pairs += [(part_a[i], part_b[j]) for i, j in cuts]
        for (i, j), (k, m) in pairwise(places):
            stack.append((first_a + i + 1, first_a + k, first_b + j + 1, first_b + m, level if cuts else level + 1))
    return pairs


def _by_cells(a: Sequence[int], b: Sequence[int], score: Score) -> list[tuple[int, int]]:
    """The alignment with the largest sum of scores, by dynamic programming."""
    height, width = len(a), len(b)
    scores = [[score(i, j) for j in b] for i in a]
    best = [[0] * (width + 1) for _ in range(height + 1)]
    for row in range(height - 1, -1, -1):
        below, here, line = best[row + 1], best[row], scores[row]
        for column in range(width - 1, -1, -1):
            value = max(below[column], here[column + 1])
            if line[column]:
                value = max(value, below[column + 1] + line[column])
            here[column] = value
    pairs, row, column = [], 0, 0
    while row < height and column < width:
        gain = scores[row][column]
        if gain and best[row][column] == best[row + 1][column + 1] + gain:
            pairs.append((a[row], b[column]))
            row, column = row + 1, column + 1
        elif best[row][column] == best[row + 1][column]:
            row += 1
        else:
            column += 1
    return pairs


def _unique(
    a: Sequence[int], b: Sequence[int], keys: tuple[Sequence[Hashable], Sequence[Hashable]]
) -> list[tuple[int, int]]:
    """Places of the items whose key stands once in either list, in as long an order as both have."""
    count_a, count_b = Counter(keys[0][i] for i in a), Counter(keys[1][j] for j in b)
    place = {keys[1][j]: position for position, j in enumerate(b) if count_b[keys[1][j]] == 1}
    found = [(position, place[key]) for position, i in enumerate(a) if count_a[key := keys[0][i]] == 1 and key in place]
    return [found[position] for position in increasing([j for _, j in found])]


def _by_nearest(
    a: Sequence[int], b: Sequence[int], keys: tuple[Sequence[Hashable], Sequence[Hashable]]
) -> list[tuple[int, int]]:
    """Pair each item with one of the few equal ones that lie nearest to its relative place, in one order."""
    places: dict[Hashable, list[int]] = {}
    for position, j in enumerate(b):
        places.setdefault(keys[1][j], []).append(position)
    candidates = []
    for position, i in enumerate(a):
        equal = places.get(keys[0][i], [])
        middle = bisect_left(equal, position * len(b) // len(a))
        near = equal[max(0, middle - _CANDIDATES // 2) : middle + _CANDIDATES // 2]
        # From the last to the first, so that an increasing sequence holds one at most of an item.
        candidates += [(position, j) for j in reversed(near)]
    chosen = increasing([j for _, j in candidates])
    return [(a[candidates[place][0]], b[candidates[place][1]]) for place in chosen]


def increasing(values: Sequence[int]) -> list[int]:
    """Places of a longest strictly increasing subsequence, in O(n log n)."""
    ends: list[int] = []
    places: list[int] = []
    before: list[int] = []
    for place, value in enumerate(values):
        slot = bisect_left(ends, value)
        if slot == len(ends):
            ends.append(value)
            places.append(place)
        else:
            ends[slot], places[slot] = value, place
        before.append(places[slot - 1] if slot else -1)
    found: list[int] = []
    place = places[-1] if places else -1
    while place >= 0:
        found.append(place)
        place = before[place]
    return found[::-1]
