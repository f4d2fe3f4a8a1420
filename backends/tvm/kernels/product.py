"""Products with a constant matrix: linear layers and 1x1 convolutions in channels-last order.

The rows of the left operand lie one after the other; the matrix is packed in vectors of columns. A task computes a
block of rows (small enough for its operands to stay in the second-level cache) by a group of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, flat, index, lanes_of, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.rows import Division, Part, Rows, crossing, divisions, waiting
from graphopt.backends.tvm.kernels.runs import Run, each_run
from graphopt.backends.tvm.kernels.tile import (
    Panels,
    accumulate,
    best_tile,
    cycles_of,
    each_part,
    fetching,
    finish,
    steps_at_once,
)

__all__ = ["column_of", "division", "packed_vectors", "product", "product_kernel"]


def packed_vectors(columns: int, lanes: int) -> list[int]:
    """Where each vector of a packed matrix begins. The last one overlaps the one before rather than reach too far."""
    return [min(start, max(columns - lanes, 0)) for start in range(0, columns, lanes)]


def column_of(code: Code, vector_number: Any, columns: int, lanes: int) -> Any:
    """The first column of a vector of a packed matrix."""
    start = vector_number * lanes
    if columns % lanes == 0 or columns < lanes:
        return start
    return code.let("column", tirx.min(start, index(columns - lanes)))


def product(data: te.Tensor, weight: te.Tensor, columns: int) -> te.Tensor:
    """data [..., K] times a packed matrix [vectors, K, lanes] -> [..., columns], as a specification."""
    _, depth, lanes = (int(size) for size in weight.shape)
    k = te.reduce_axis((0, depth), "k")
    last = max(columns - lanes, 0)

    def element(*at: Any) -> Any:
        *rows, column = at
        number = tirx.floordiv(column, lanes)
        lane = column - tirx.min(number * lanes, last)
        return te.sum(data(*rows, k) * weight(number, k, lane), axis=[k])

    shape = (*list(data.shape)[:-1], columns)
    return te.compute(shape, element, name="product", attrs={ANCHOR: "product"})


def product_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `product`; None when it is something else or not in float32."""
    if fused.notes["kernel"] != "product" or str(fused.result.dtype) != "float32":
        return None
    data, weight = fused.reads[:2]
    code = Code()
    _Product(code, fused, data, weight, machine).emit()
    return fused.rewritten(code.done())


@dataclass
class _Product:
    code: Code
    fused: Fused
    data: Any
    weight: Any
    machine: Machine

    def __post_init__(self) -> None:
        self.vectors, self.depth, self.lanes = (int(size) for size in self.weight.shape)
        self.machine = self.machine.of_lanes(self.lanes)
        self.columns = int(self.fused.result.shape[-1])
        self.rows = Rows.of(self.data.shape)

    def emit(self) -> None:
        self.source = flat(self.code, self.data)
        self.flat_weight = flat(self.code, self.weight)
        if self.rows.dynamic and self.rows.count < 4:
            self._any_number_of_rows()
            return
        plan, _ = division(self.rows.count, self.vectors, self.depth, self.machine)

        def task(part: Part) -> None:
            if plan.chunks == 1:
                self._tiles(part, self._whole)
            else:
                self._in_chunks(part, plan.chunks)

        self.rows.each_part(self.code, plan, self.vectors, task)

    def _tiles(self, part: Part, tile: Callable[[Part, Any, int, Any, int], None]) -> None:
        """Call `tile(part, row, rows, vector, vectors)` for the tiles of a part: all rows, then the next vectors."""
        code = self.code
        tall, wide = best_tile(part.rows, part.units, self.machine)

        def columns(q: Any, wide: int) -> None:
            each_part(code, "row", tall, lambda p, tall: tile(part, p, tall, q, wide))

        each_part(code, "vectors", wide, columns)

    def _whole(self, part: Part, p: Any, tall: int, q: Any, wide: int) -> None:
        self._tile(part.first + p, part.base + q, tall, wide, (p, part.rows))

    def _in_chunks(self, part: Part, chunks: int) -> None:
        """A chunk of the depth at a time, so that rows and weights stay in the caches; sums are kept meanwhile."""
        code, lanes, steps = self.code, self.lanes, self.depth // chunks
        rows = code.scratch("rows", [part.rows, steps])
        kept = code.scratch("kept", [part.rows, part.units, lanes])
        whole = vector(0, lanes)

        def everywhere(body: Callable[[Any, Any], None]) -> None:
            with code.loop("row", part.rows) as p, code.loop("vector", part.units) as q:
                body(p, q)

        everywhere(lambda p, q: code.store(kept, [p, q, whole], lanes_of(tirx.const(0, "float32"), lanes)))
        with code.loop("chunk", chunks) as chunk:
            start = code.let("start", chunk * steps)
            with code.loop("row", part.rows) as p:
                line = code.let("line", (part.first + p) * self.depth + start)
                move = partial(self._copy, rows, p, line)
                each_run(code, steps, lanes, move)

            def tile(part: Part, p: Any, tall: int, q: Any, wide: int) -> None:
                number = code.let("first_vector", part.base + q)
                choices = self.machine.choices
                unroll = steps_at_once(steps, choices)
                following = ((number + wide) * self.depth + start) * lanes
                panels = Panels(following, self.depth * lanes, steps * lanes, wide)
                ahead = fetching(code, self.flat_weight, panels, (p, tall, part.rows), steps // unroll, choices)
                sums = accumulate(
                    code,
                    (tall, wide),
                    lanes,
                    [steps],
                    lambda i, k: rows[p + i, k],
                    lambda j, k: self.weight[number + j, start + k, whole],
                    unroll,
                    ahead,
                    lambda i, j: kept[p + i, q + j, whole],
                )
                for i, row in enumerate(sums):
                    for j, total in enumerate(row):
                        code.store(kept, [p + i, q + j, whole], total[whole])

            self._tiles(part, tile)
        everywhere(partial(self._emit, part, kept))

    def _copy(self, rows: Any, p: Any, line: Any, run: Run) -> None:
        self.code.store(rows, [p, run.places], self.source[vector(line + run.start, run.count)])

    def _emit(self, part: Part, kept: Any, p: Any, q: Any) -> None:
        """What follows, for a vector of kept sums."""
        code = self.code
        start = column_of(code, part.base + q, self.columns, self.lanes)
        place = self.rows.place(part.first + p)
        with code.loop("lane", self.lanes, "vectorized") as lane:
            self.fused.epilogue.emit(code, kept[p, q, lane], [*place, start + lane])

    def _any_number_of_rows(self) -> None:
        """A dynamic number of rows: tiles of one height, the last of which overlaps the one before."""
        code = self.code
        rows = code.let("rows", self.rows.outer * self.rows.count)
        _, wide = best_tile(4, self.vectors, self.machine)
        tall = (self.machine.registers - 1 - wide.size) // wide.size
        count = code.let("tiles", tirx.floordiv(rows + (tall - 1), index(tall)))
        with code.when(rows >= tall), code.loop("task", count, "parallel") as task:
            first = code.let("first", tirx.min(task * tall, rows - tall))
            each_part(code, "vectors", wide, lambda q, wide: self._tile(first, q, tall, wide))
        with code.when(rows < tall):
            _, wide = best_tile(1, self.vectors, self.machine)

            def few(q: Any, wide: int) -> None:
                with code.loop("row", rows) as row:
                    self._tile(row, q, 1, wide)

            each_part(code, "vectors", wide, few, "parallel")

    def _tile(self, row: Any, number: Any, tall: int, wide: int, passed: tuple[Any, int] | None = None) -> None:
        """Compute a tile. With the rows that were `passed` of those in a block, fetch a part of the next weights."""
        code, lanes, depth = self.code, self.lanes, self.depth
        row, number = code.let("first_row", row), code.let("first_vector", number)

        def left(p: int, k: Any) -> Any:
            return self.source[(row + p) * depth + k]

        def right(q: int, k: Any) -> Any:
            return self.weight[number + q, k, vector(0, lanes)]

        unroll, ahead = steps_at_once(depth, self.machine.choices), None
        if passed is not None:
            (done, rows), panel = passed, lanes * depth
            panels = Panels.side_by_side((number + wide) * panel, wide * panel)
            ahead = fetching(code, self.flat_weight, panels, (done, tall, rows), depth // unroll, self.machine.choices)
        sums = accumulate(code, (tall, wide), lanes, [depth], left, right, unroll, ahead)
        starts = [column_of(code, number + q, self.columns, lanes) for q in range(wide)]

        def store(p: int, q: int, value: Any, lane: Any) -> None:
            self.fused.epilogue.emit(code, value, [*self.rows.place(row + p), starts[q] + lane])

        finish(code, sums, lanes, min(lanes, self.columns), store)


@cache
def division(rows: int, vectors: int, depth: int, machine: Machine) -> tuple[Division, float]:
    """The division that was measured to be best, or takes the least time by the model; and how many cycles that are.

    A task reads all weights of its group once, so that blocks of rows had better be large. But the rows of a chunk
    must stay in the cache, with the sums that are kept from chunk to chunk, and the tasks must keep all threads busy.
    """
    if machine.choices.division is not None:
        return Division(*machine.choices.division), 0.0
    lanes, choices = machine.lanes, []
    for plan in divisions(rows, depth, machine):
        groups, chunks = plan.groups, plan.chunks
        if groups > vectors or (chunks > 1 and vectors < 2 * groups):
            continue
        block, group = -(-rows // plan.blocks), -(-vectors // groups)
        space = 4 * block * (depth // chunks + (group * lanes if chunks > 1 else 0))
        if space > machine.l2 * 5 // 8 and block > 1:
            continue
        turns = -(-plan.blocks * groups // machine.threads)
        tiles = cycles_of(*best_tile(block, group, machine), machine) * depth
        keeping = block * group * (2 * chunks + 4) + block * depth / 4 if chunks > 1 else 0
        cost = turns * (tiles + keeping + waiting(4 * lanes * depth * group, tiles, machine))
        cost += crossing(rows, depth, lanes * vectors, groups)
        choices.append((cost, plan.blocks * groups, plan))
    cost, _, plan = min(choices, key=lambda choice: choice[:2])
    return plan, cost
