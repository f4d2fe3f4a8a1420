"""Products of two computed matrices, in batches.

A task computes a block of rows by a group of columns of one product. Where the right operand lies with its columns
side by side in memory it is read as it lies; otherwise the task first turns the columns that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, index, unravelled, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import column_of
from graphopt.backends.tvm.kernels.tile import Parts, accumulate, best_tile, each_part, finish

__all__ = ["matmul", "matmul_kernel"]

_ROWS = 48
"""Rows of a task at most; the columns of the right operand are read once for them."""


def matmul(
    left: te.Tensor, left_order: Sequence[int], right: te.Tensor, right_order: Sequence[int], lead: Sequence[Any]
) -> te.Tensor:
    """left [..., M, K] times right [..., K, N], each stored in an order of its own, as a specification.

    Args:
        lead: the leading sizes of the result; an operand may have fewer, or ones, and is repeated along them.
    """
    sizes = [
        [tensor.shape[list(order).index(axis)] for axis in range(len(order))]
        for tensor, order in ((left, left_order), (right, right_order))
    ]
    k = te.reduce_axis((0, sizes[0][-1]), "k")

    def read(tensor: Any, order: Sequence[int], own: Sequence[Any], at: Sequence[Any]) -> Any:
        places = leading(own[:-2], at[:-2]) + list(at[-2:])
        return tensor(*(places[axis] for axis in order))

    def element(*at: Any) -> Any:
        *heads, m, n = at
        a = read(left, left_order, sizes[0], [*heads, m, k])
        return te.sum(a * read(right, right_order, sizes[1], [*heads, k, n]), axis=[k])

    orders = ",".join("".join(map(str, order)) for order in (left_order, right_order))
    notes = {ANCHOR: "matmul", "graphopt.orders": orders}
    return te.compute((*lead, sizes[0][-2], sizes[1][-1]), element, name="matmul", attrs=notes)


def leading(sizes: Sequence[Any], at: Sequence[Any]) -> list[Any]:
    """The leading indices of an operand that is broadcast over those of the result."""
    ones = [isinstance(size, tirx.IntImm) and int(size) == 1 for size in sizes]
    return [index(0) if one else i for one, i in zip(ones, at[len(at) - len(sizes) :], strict=True)]


def matmul_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `matmul`; None when it is something else, or the columns are few or of unknown number."""
    if fused.notes["kernel"] != "matmul" or str(fused.result.dtype) != "float32":
        return None
    sizes = fused.result.shape[-2:]
    if len(fused.reads) != 2 or not isinstance(sizes[1], tirx.IntImm) or int(sizes[1]) < machine.lanes:
        return None
    code = Code()
    kernel = _Matmul(code, fused, machine)
    if kernel.turns and not isinstance(kernel.depth, tirx.IntImm):
        return None
    kernel.emit()
    return fused.rewritten(code.done())


@dataclass
class _Matmul:
    code: Code
    fused: Fused
    machine: Machine

    def __post_init__(self) -> None:
        self.left, self.right = self.fused.reads
        orders = str(self.fused.notes["orders"]).split(",")
        self.left_order, self.right_order = ([int(axis) for axis in order] for order in orders)
        *self.lead, self.rows, columns = self.fused.result.shape
        self.columns = int(columns)
        self.depth = self.left.shape[self.left_order.index(len(self.left_order) - 1)]
        self.lanes = self.machine.lanes
        self.vectors = -(-self.columns // self.lanes)
        self.turns = self.right_order[-1] != len(self.right_order) - 1

    def emit(self) -> None:
        code, heads = self.code, math.prod(self.lead, start=index(1))
        rows = int(self.rows) if isinstance(self.rows, tirx.IntImm) else 0
        (most,) = self.machine.choices.division or (_ROWS,)
        block = Parts.of(rows, most).size if rows else 1
        groups = self._groups(rows, block)
        group = -(-self.vectors // groups)
        blocks = tirx.floordiv(index(self.rows) + (block - 1), index(block))
        with code.loop("task", heads * blocks * groups, "parallel") as task:
            head = unravelled(code, tirx.floordiv(task, blocks * groups), self.lead)
            place = code.let("place", tirx.floormod(task, blocks * groups))
            first = tirx.min(tirx.floordiv(place, index(groups)) * block, index(self.rows) - block)
            first = code.let("first", first)
            base = tirx.min(tirx.floormod(place, index(groups)) * group, index(self.vectors - group))
            self._task(head, first, block, code.let("base", base), group)

    def _groups(self, rows: int, block: int) -> int:
        """Into how many groups to cut the columns, so that all threads have work."""
        heads = math.prod(int(size) if isinstance(size, tirx.IntImm) else 1 for size in self.lead)
        tasks = heads * -(-rows // block) if rows else self.machine.threads
        return 1 if tasks >= self.machine.threads else min(self.machine.threads, self.vectors)

    def _task(self, head: list[Any], first: Any, rows: int, base: Any, group: int) -> None:
        code, lanes = self.code, self.lanes
        turned = self._turned(head, base, group) if self.turns else None
        tall, wide = best_tile(rows, group, self.machine)

        def tile(row: Any, tall: int, number: Any, wide: int) -> None:
            row, number = code.let("row", first + row), code.let("vector", number)
            columns = [column_of(code, base + number + q, self.columns, lanes) for q in range(wide)]

            def right(q: int, k: Any) -> Any:
                if turned is not None:
                    return turned[number + q, k, vector(0, lanes)]
                return self._read(self.right, self.right_order, [*head, k, vector(columns[q], lanes)])

            def left(p: int, k: Any) -> Any:
                return self._read(self.left, self.left_order, [*head, row + p, k])

            sums = accumulate(code, (tall, wide), lanes, [index(self.depth)], left, right)

            def store(p: int, q: int, value: Any, lane: Any) -> None:
                self.fused.epilogue.emit(code, value, [*head, row + p, columns[q] + lane])

            finish(code, sums, lanes, lanes, store)

        each_part(code, "vectors", wide, lambda q, w: each_part(code, "rows", tall, lambda p, t: tile(p, t, q, w)))

    def _turned(self, head: list[Any], base: Any, group: int) -> Any:
        """The columns of a task in vectors, one after the other."""
        code, lanes = self.code, self.lanes
        turned = code.scratch("turned", [group, int(self.depth), lanes])
        with code.loop("number", group) as number:
            first = code.let("column", column_of(code, base + number, self.columns, lanes))
            with code.loop("lane", lanes) as lane, code.loop("k", int(self.depth)) as k:
                value = self._read(self.right, self.right_order, [*head, k, first + lane])
                code.store(turned, [number, k, lane], value)
        return turned

    def _read(self, buffer: Any, order: Sequence[int], at: Sequence[Any]) -> Any:
        sizes = [buffer.shape[order.index(axis)] for axis in range(len(order))]
        places = leading(sizes[:-2], at[:-2]) + list(at[-2:])
        return buffer[tuple(places[axis] for axis in order)]
