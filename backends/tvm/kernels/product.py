"""Products with a constant matrix: linear layers and 1x1 convolutions in channels-last order.

The rows of the left operand lie one after the other; the matrix is packed in vectors of columns. A task computes a
block of rows (small enough for its operands to stay in the second-level cache) by a group of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, flat, index, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.tile import (
    accumulate,
    best_tile,
    cycles_of,
    each_part,
    fetching,
    finish,
    steps_at_once,
)

__all__ = ["column_of", "packed_vectors", "product", "product_kernel"]

_L3_BYTES_PER_CYCLE = 12


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
        self.columns = int(self.fused.result.shape[-1])
        self.sizes = list(self.data.shape)[:-1]
        static = len(self.sizes)
        while static and isinstance(self.sizes[static - 1], tirx.IntImm):
            static -= 1
        self.outer = math.prod(self.sizes[:static], start=index(1))
        self.rows = math.prod(int(size) for size in self.sizes[static:])
        self.dynamic = static > 0

    def emit(self) -> None:
        self.source = flat(self.code, self.data)
        self.flat_weight = flat(self.code, self.weight)
        if self.dynamic and self.rows < 4:
            self._any_number_of_rows()
        else:
            self._blocks_of_rows()

    def _blocks_of_rows(self) -> None:
        code = self.code
        blocks, groups = _division(self.rows, self.vectors, self.depth, self.machine)
        block_rows, group_vectors = -(-self.rows // blocks), -(-self.vectors // groups)
        tall, wide = best_tile(block_rows, group_vectors, self.machine)
        outer: Any = self.outer if self.dynamic else 1
        with code.loop("task", outer * (blocks * groups), "parallel") as task:
            place = code.let("place", tirx.floormod(task, index(blocks * groups)))
            image = tirx.floordiv(task, index(blocks * groups)) * self.rows if self.dynamic else index(0)
            block = tirx.floordiv(place, index(groups)) * block_rows
            group = tirx.floormod(place, index(groups)) * group_vectors
            first = code.let("first", image + tirx.min(block, index(self.rows - block_rows)))
            base = code.let("base", tirx.min(group, index(self.vectors - group_vectors)))

            def columns(q: Any, wide: int) -> None:
                each_part(
                    code, "row", tall, lambda p, tall: self._tile(first + p, base + q, tall, wide, (p, block_rows))
                )

            each_part(code, "vectors", wide, columns)

    def _any_number_of_rows(self) -> None:
        """A dynamic number of rows: tiles of one height, the last of which overlaps the one before."""
        code = self.code
        rows = code.let("rows", self.outer * self.rows)
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

        unroll, ahead = steps_at_once(depth), None
        if passed is not None:
            (done, rows), panel = passed, lanes * depth
            following = ((number + wide) * panel, wide * panel)
            ahead = fetching(code, self.flat_weight, following, (done, tall, rows), depth // unroll)
        sums = accumulate(code, (tall, wide), lanes, [depth], left, right, unroll, ahead)
        starts = [column_of(code, number + q, self.columns, lanes) for q in range(wide)]

        def store(p: int, q: int, value: Any, lane: Any) -> None:
            self.fused.epilogue.emit(code, value, [*_unravelled(row + p, self.sizes), starts[q] + lane])

        finish(code, sums, lanes, min(lanes, self.columns), store)


def _unravelled(row: Any, sizes: list[Any]) -> list[Any]:
    """The indices of the row of this number in a tensor of these sizes.

    In one expression: where TVM looks at a named remainder by a free size, it finds that the size may be zero.
    """
    place: list[Any] = []
    for size in reversed(sizes[1:]):
        place.append(tirx.floormod(row, size))
        row = tirx.floordiv(row, size)
    return [row, *reversed(place)] if sizes else []


def _division(rows: int, vectors: int, depth: int, machine: Machine) -> tuple[int, int]:
    """Into how many blocks of rows and groups of columns to divide the work.

    A task reads all weights of its group once: little is gained from small blocks. But a block must stay in the
    cache, and the tasks must keep all threads busy.
    """
    lanes, threads = machine.lanes, machine.threads
    fitting = max(1, machine.l2 // 2 // (4 * depth))
    least = -(-rows // fitting)
    choices = []
    for blocks in {least, -(-least // threads) * threads, threads, 2 * threads}:
        for groups in (1, threads):
            if not least <= blocks <= rows or groups > vectors:
                continue
            block, group = -(-rows // blocks), -(-vectors // groups)
            tasks = blocks * groups
            compute = cycles_of(*best_tile(block, group, machine)) * depth * -(-tasks // threads)
            weights = 4 * lanes * depth * group * -(-tasks // threads)
            cached = weights / blocks <= machine.l2 // 2
            choices.append((compute + (0 if cached else weights / _L3_BYTES_PER_CYCLE), tasks, blocks, groups))
    *_, blocks, groups = min(choices)
    return blocks, groups
