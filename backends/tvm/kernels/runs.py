"""Going along a row in vectors, whatever its length, and adding it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.emit import Code, index, lanes_of, vector

__all__ = ["Run", "each_run", "reduced_row"]

_SIDE_BY_SIDE = 4
"""Vectors in work at once: a sum need not wait for the one before (four cycles)."""


@dataclass(frozen=True)
class Run:
    """Some elements of a row, one after the other.

    Attributes:
        start: where they begin.
        count: how many they are: the lanes of a vector, or one.
        stale: so many of them, at the front, belong to an earlier run as well.
        side: which of the runs that are worked on side by side it is.
    """

    start: Any
    count: int
    stale: int = 0
    side: int = 0

    @property
    def places(self) -> Any:
        return vector(self.start, self.count)


def each_run(code: Code, width: int | Any, lanes: int, body: Callable[[Run], None], sides: int = 1) -> None:
    """Call `body` for runs that make up a row.

    The last vector of a row that does not fill whole ones begins early. A row that is shorter than a vector, and the
    rest of one whose length is known at run time only, are met one by one.
    """
    if isinstance(width, int):
        whole, rest = divmod(width, lanes)
        if whole == 0:
            _one_by_one(code, index(0), width, body)
            return
        sides = max(size for size in range(1, sides + 1) if whole % size == 0)
        with code.loop("vector", whole // sides) as i:
            for side in range(sides):
                body(Run(code.let("start", (i * sides + side) * lanes), lanes, 0, side))
        if rest:
            body(Run(index(width - lanes), lanes, lanes - rest))
        return
    whole = code.let("vectors", tirx.floordiv(width, index(lanes)))
    with code.loop("vector", whole) as i:
        body(Run(code.let("start", i * lanes), lanes))
    _one_by_one(code, whole * lanes, width - whole * lanes, body)


def _one_by_one(code: Code, first: Any, count: int | Any, body: Callable[[Run], None]) -> None:
    with code.loop("rest", count) as i:
        body(Run(code.let("start", first + i), 1))


def reduced_row(
    code: Code,
    width: int | Any,
    lanes: int,
    element: Callable[[Run], Any],
    neutral: float,
    combine: Callable[[Any, Any], Any],
) -> Any:
    """The sum, maximum or the like of the float32 values that `element` gives for the runs of a row, named."""
    none = tirx.const(neutral, "float32")
    totals = [code.local(f"total_{side}", lanes) for side in range(_SIDE_BY_SIDE)]
    for total in totals:
        code.store(total, vector(0, lanes), lanes_of(none, lanes))

    def add(run: Run) -> None:
        value, total = element(run), totals[run.side]
        if run.stale:
            fresh = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes) >= tirx.Broadcast(
                tirx.const(run.stale, "int32"), lanes
            )
            value = tirx.Select(fresh, value, lanes_of(none, lanes))
        place = vector(0, run.count)
        code.store(total, place, combine(total[place], value))

    each_run(code, width, lanes, add, _SIDE_BY_SIDE)
    for total in totals[1:]:
        code.store(totals[0], vector(0, lanes), combine(totals[0][vector(0, lanes)], total[vector(0, lanes)]))
    parts = [totals[0][index(lane)] for lane in range(lanes)]
    while len(parts) > 1:
        parts = [code.let("part", combine(a, b)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
