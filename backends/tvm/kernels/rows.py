"""The rows of a left operand [..., depth], and how products with a constant matrix are shared among tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.emit import Code, index
from graphopt.backends.tvm.kernels.machine import Machine

__all__ = ["Division", "Part", "Rows", "crossing", "divisions", "waiting"]

_BYTES_PER_CYCLE = 4
"""What one core draws from memory while others draw too."""

_CROSSING_BYTES_PER_CYCLE = 8
"""What comes from the cache of another core."""

_SHORTEST_CHUNK = 128
"""Steps of a reduction that repay loading and storing a tile of sums."""


@dataclass(frozen=True)
class Division:
    """Into how many blocks of rows, groups of columns and chunks of the depth to divide the work."""

    blocks: int
    groups: int
    chunks: int


def divisions(rows: int, depth: int, machine: Machine) -> Iterator[Division]:
    """Those worth a thought."""
    threads = machine.threads
    few = {*range(1, 9), *(threads * n for n in range(1, 9)), *(threads * 2**n for n in range(4, 16))}
    blocks = {-(-rows // -(-rows // n)) for n in few if n <= rows} | {rows}
    chunks = [n for n in range(1, depth // _SHORTEST_CHUNK + 1) if depth % n == 0] or [1]
    for parts in itertools.product(sorted(blocks), (1, threads), chunks):
        yield Division(*parts)


def waiting(weights: int, computing: float, machine: Machine) -> float:
    """Cycles that a task waits for so many bytes of weights, which come while it computes."""
    if weights <= machine.l2 // 4:
        return 0
    stream = weights / _BYTES_PER_CYCLE
    return max(0, stream - computing) + stream / 8


def crossing(rows: int, depth: int, columns: int, groups: int) -> float:
    """Cycles lost on rows that other cores have written or will read, where columns are divided.

    Kernels one after the other give the same rows of an image to the same thread.
    """
    return 4 * rows * (depth + columns) / 2 / _CROSSING_BYTES_PER_CYCLE if groups > 1 else 0


@dataclass(frozen=True)
class Part:
    """What a task computes.

    Attributes:
        first: its first row.
        base: its first unit of columns.
        rows, units: how many there are.
        fresh: the first of its rows that no task before computes.
    """

    first: Any
    base: Any
    rows: int
    units: int
    fresh: Any


@dataclass(frozen=True)
class Rows:
    """Rows that lie one after the other.

    Attributes:
        sizes: of the axes that they are numbered by.
        outer: how many groups of rows there are, the product of the sizes up to the last free one.
        count: the rows of a group.
        dynamic: whether the number of groups is known at run time only.
    """

    sizes: tuple[Any, ...]
    outer: Any
    count: int
    dynamic: bool

    @classmethod
    def of(cls, shape: Any) -> Rows:
        """The rows of a tensor of this shape, in which the last axis is that of the depth."""
        sizes = tuple(shape)[:-1]
        static = len(sizes)
        while static and isinstance(sizes[static - 1], int | tirx.IntImm):
            static -= 1
        outer = math.prod(sizes[:static], start=index(1))
        return cls(sizes, outer, math.prod(int(size) for size in sizes[static:]), static > 0)

    def place(self, row: Any) -> list[Any]:
        """The indices of the row of this number.

        In one expression: where TVM looks at a named remainder by a free size, it finds that the size may be zero.
        """
        place: list[Any] = []
        for size in reversed(self.sizes[1:]):
            place.append(tirx.floormod(row, size))
            row = tirx.floordiv(row, size)
        return [row, *reversed(place)] if self.sizes else []

    def each_part(self, code: Code, division: Division, units: int, body: Callable[[Part], None]) -> None:
        """Call `body` in a task for every block of rows and group of units; the last ones overlap those before."""
        blocks, groups = division.blocks, division.groups
        rows, group_units = -(-self.count // blocks), -(-units // groups)
        outer: Any = self.outer if self.dynamic else 1
        with code.loop("task", outer * (blocks * groups), "parallel") as task:
            place = code.let("place", tirx.floormod(task, index(blocks * groups)))
            image = tirx.floordiv(task, index(blocks * groups)) * self.count if self.dynamic else index(0)
            block = tirx.floordiv(place, index(groups)) * rows
            group = tirx.floormod(place, index(groups)) * group_units
            first = code.let("first", image + tirx.min(block, index(self.count - rows)))
            base = code.let("base", tirx.min(group, index(units - group_units)))
            body(Part(first, base, rows, group_units, first if self.count % rows == 0 else image + block))
