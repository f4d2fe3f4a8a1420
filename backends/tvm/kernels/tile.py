"""Register tiles: which block of the result one round of the innermost code computes, and that code.

A tile is P rows by Q vectors of the result, each vector an accumulator that stays in a register while the code runs
over the whole reduction. Each step of the reduction loads Q vectors of weights and P numbers of the other operand,
each repeated in all lanes, and does P * Q multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.choices import Choices
from graphopt.backends.tvm.kernels.emit import Code, index, lanes_of, vector
from graphopt.backends.tvm.kernels.machine import Machine

__all__ = [
    "Panels",
    "Parts",
    "accumulate",
    "best_tile",
    "cycles_of",
    "each_part",
    "fetching",
    "finish",
    "steps_at_once",
]

_LINE = 16
"""Numbers in a line of the caches."""

_LOADS, _LATENCY = 2, 4
"""Loads in a cycle, and cycles from one sum to the next."""

_TALLEST_NARROW = 10
"""Rows of a tile of one vector: more may lie so that they have no room beside one another in the first cache."""


@dataclass(frozen=True)
class Parts:
    """A length cut into pieces whose sizes differ by one at most: `large` of `size`, then `small` of `size - 1`."""

    size: int
    large: int
    small: int

    @classmethod
    def of(cls, length: int, most: int) -> Parts:
        count = -(-length // most)
        size, rest = divmod(length, count)
        return cls(size + 1, rest, count - rest) if rest else cls(size, count, 0)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(size, number of pieces, where the first begins) of each kind of piece."""
        both = [(self.size, self.large, 0), (self.size - 1, self.small, self.size * self.large)]
        return [kind for kind in both if kind[1]]


@cache
def best_tile(rows: int, vectors: int, machine: Machine) -> tuple[Parts, Parts]:
    """Cut rows and vectors of a result into the tiles that were measured to be best, or else take the least time.

    Among tiles of equal time those that load least are taken; but where a multiply-add takes a whole cycle, loads are
    no limit, and the narrowest, whose weights stay in the first cache from row to row, were measured to be fastest.
    """
    if machine.choices.tile is not None:
        tall, wide = machine.choices.tile
        return Parts.of(rows, min(tall, rows)), Parts.of(vectors, min(wide, vectors))
    narrow = machine.multiply_adds == 1
    tallest = _TALLEST_NARROW if narrow else machine.registers
    cuts = [
        (Parts.of(rows, tall), Parts.of(vectors, wide))
        for wide in range(1, min(vectors, 6) + 1)
        for tall in range(1, min(rows, tallest, (machine.registers - 1 - wide) // wide) + 1)
    ]

    def rank(cut: tuple[Parts, Parts]) -> tuple[float, int, int]:
        return cycles_of(*cut, machine), cut[1].size if narrow else 0, _loads_of(*cut)

    return min(cuts, key=rank)


def cycles_of(rows: Parts, vectors: Parts, machine: Machine) -> float:
    """How long a step of the reduction takes for a whole result cut like this, in cycles of two multiply-adds.

    The model: the multiply-adds; the loads, two in a cycle; and the latency of an accumulation, four cycles, which as
    many accumulators for each multiply-add of a cycle hide.
    """

    def one(p: int, q: int) -> float:
        return max(p * q / machine.multiply_adds, (p + q) / _LOADS, _LATENCY) * machine.multiply_adds / 2

    return sum(count * times * one(p, q) for p, count, _ in rows.sizes for q, times, _ in vectors.sizes)


def _loads_of(rows: Parts, vectors: Parts) -> int:
    return sum(count * times * (p + q) for p, count, _ in rows.sizes for q, times, _ in vectors.sizes)


def each_part(code: Code, name: str, parts: Parts, body: Callable[[Any, int], None], kind: str = "serial") -> None:
    """Run `body(start, size)` for every piece; each size of piece has code of its own."""
    for size, count, first in parts.sizes:
        with code.loop(name, count, kind) as i:
            body(code.let(f"{name}_at", i * size + first), size)


def accumulate(
    code: Code,
    tile: tuple[int, int],
    lanes: int,
    extents: Sequence[int],
    left: Callable[..., Any],
    right: Callable[..., Any],
    unroll: int = 1,
    ahead: Callable[[Any], None] | None = None,
    start: Callable[[int, int], Any] | None = None,
) -> list[list[Any]]:
    """The sums over `extents` of left(p, *k) * right(q, *k), as P x Q buffers of one vector each.

    `left` gives a number, `right` a vector. `ahead` is called in every round of `unroll` steps
    with its number; there are no rounds where `unroll` is 1. Sums start with the vector start(p, q), or zero.
    """
    tall, wide = tile
    zero = lanes_of(tirx.const(0, "float32"), lanes)
    place = vector(0, lanes)
    sums = [[code.local(f"sum_{p}_{q}", lanes) for q in range(wide)] for p in range(tall)]
    for p, row in enumerate(sums):
        for q, total in enumerate(row):
            code.store(total, place, zero if start is None else start(p, q))

    def step(k: list[Any]) -> None:
        weights = [code.let(f"w{q}", right(q, *k)) for q in range(wide)]
        for p in range(tall):
            x = code.let(f"x{p}", lanes_of(left(p, *k), lanes))
            for q in range(wide):
                code.store(sums[p][q], place, sums[p][q][place] + x * weights[q])

    def nest(k: list[Any], remaining: Sequence[int]) -> None:
        if not remaining:
            step(k)
            return
        extent, *inner = remaining
        if not inner and unroll > 1 and extent % unroll == 0:
            with code.loop("k", extent // unroll) as outer:
                if ahead is not None:
                    number: Any = index(0)
                    for place, size in zip(k, extents, strict=False):
                        number = number * size + place
                    ahead(number * (extent // unroll) + outer)
                for u in range(unroll):
                    step([*k, outer * unroll + u])
            return
        with code.loop("k", extent) as at:
            nest([*k, at], inner)

    nest([], list(extents))
    return sums


def steps_at_once(depth: int, choices: Choices) -> int:
    """How many steps of a reduction to write one after the other: a divisor."""
    if choices.steps is not None:
        return max(steps for steps in range(1, choices.steps + 1) if depth % steps == 0)
    return next((steps for steps in (4, 6, 5) if depth % steps == 0), 1)


@dataclass(frozen=True)
class Panels:
    """Weights that will be read next: `count` runs of `size` numbers, the first at `start`, the others `step` apart."""

    start: Any
    step: int
    size: int
    count: int

    @classmethod
    def side_by_side(cls, start: Any, size: int) -> Panels:
        return cls(start, size, size, 1)


def fetching(
    code: Code, weights: Any, panels: Panels, part: tuple[Any, int, int], rounds: int, choices: Choices
) -> Callable[[Any], None] | None:
    """What brings the next weights into the cache while the rows of a block meet the present ones.

    Weights come from memory or the third-level cache, and the processor foresees no more than a page of them. Fetched
    beyond their end, they are as good as any memory.

    Args:
        weights: flat.
        part: row, rows of the tile, rows in all: which part of them to fetch during this tile.
        rounds: how often the result will be called, with 0, 1, 2, ...
    """
    if choices.fetch is False:
        return None
    row, tall, rows = part
    each_run = panels.size // _LINE
    lines = each_run * panels.count
    first, begin = tirx.floordiv(row * lines, index(rows)), panels.start
    if panels.count > 1:
        run = code.let("run", tirx.floordiv(first, index(each_run)))
        begin, first = begin + run * panels.step, first - run * each_run
    first = code.let("line", tirx.floordiv(begin, index(_LINE)) + first)
    each = -(-lines * tall // (rows * rounds))

    def ahead(number: Any) -> None:
        for n in range(each):
            code.fetch(weights, (first + number * each + n) * _LINE)

    return ahead


def finish(
    code: Code, sums: list[list[Any]], lanes: int, columns: int, store: Callable[[int, int, Any, Any], None]
) -> None:
    """Call `store(p, q, value, lane)` for every number of a tile, the `columns` first lanes of each vector at once."""
    for p, row in enumerate(sums):
        for q, total in enumerate(row):
            if columns == lanes:
                with code.loop("lane", lanes, "vectorized") as lane:
                    store(p, q, total[lane], lane)
                continue
            for lane in range(columns):
                store(p, q, total[index(lane)], index(lane))
