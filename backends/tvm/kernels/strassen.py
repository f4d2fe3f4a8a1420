"""Products with a constant matrix by seven products of half the size, where plain ones take eight.

Both operands and the result are cut into quarters. Seven sums of quarters of the left operand are multiplied with
seven sums of quarters of the matrix, which are made while compiling, and the quarters of the result are sums of these
products. (Strassen, "Gaussian elimination is not optimal", Numerische Mathematik 13, 1969.) Sums are formed of numbers
larger than the result, so that it is less exact than the plain form.

A task computes a block of rows by a group of columns, a chunk of the depth at a time: it adds up the sums of its rows,
in work space that stays in the cache, and multiplies them with a few columns of the seven matrices after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from tvm import te, tirx

from graphopt.backends.tvm.kernels.choices import linear_problem
from graphopt.backends.tvm.kernels.emit import Code, flat, index, lanes_of, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import division as plain_division
from graphopt.backends.tvm.kernels.rows import Division, Part, Rows, crossing, divisions, waiting
from graphopt.backends.tvm.kernels.runs import Run, each_run
from graphopt.backends.tvm.kernels.tile import (
    Panels,
    accumulate,
    best_tile,
    cycles_of,
    each_part,
    fetching,
    steps_at_once,
)

__all__ = ["BACK", "PRODUCTS", "division", "quarters", "strassen", "strassen_kernel", "strassen_pays"]

PRODUCTS = 7

_FEWEST_ROWS = 16
_GAIN = 1.03
"""How much faster it must be: less is not worth the weights, which are 7/4 as large."""

BACK = np.array(
    [[0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]], np.float32
)
"""How much every quarter of the matrix has of each of the seven sums."""


def strassen_pays(shape: Sequence[Any], depth: int, columns: int, machine: Machine) -> bool:
    """Whether seven products are faster than a plain one, as measured or by the model; data is [..., depth]."""
    rows = Rows.of(shape).count
    if rows < _FEWEST_ROWS or depth % 2 or columns < 4 * machine.lanes:
        return False
    told = machine.tuned.algorithms.get(linear_problem(rows, depth, columns))
    if told is not None:
        return told == "strassen"
    _, plain = plain_division(rows, -(-columns // machine.lanes), depth, machine)
    _, seven = division(rows, columns, depth, machine)
    return seven * _GAIN < plain


def quarters(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """weight [out, in] to [pairs, PRODUCTS, in / 2, lanes]: the sums of its quarters.

    A pair is a vector of columns in the left half and one in the right half. Where the columns do not make whole pairs,
    the halves overlap.
    """
    outputs, depth = weight.shape
    half, short = _half(outputs, lanes), depth // 2
    left, right = (part.reshape(-1, lanes, depth) for part in (weight[:half], weight[outputs - half :]))
    (a, c), (b, d) = ((part[..., :short].mT, part[..., short:].mT) for part in (left, right))
    return torch.stack([a + d, a, b - d, c - a, d, a + b, c + d], dim=1)


def _half(columns: int, lanes: int) -> int:
    return -(-columns // (2 * lanes)) * lanes


def strassen(data: te.Tensor, weight: te.Tensor, back: te.Tensor, columns: int) -> te.Tensor:
    """data [..., K] times a matrix, given as `quarters` and `BACK` -> [..., columns], as a specification."""
    pairs, products, short, lanes = (int(size) for size in weight.shape)
    k, i = te.reduce_axis((0, 2 * short), "k"), te.reduce_axis((0, products), "i")
    half = pairs * lanes

    def element(*at: Any) -> Any:
        *rows, column = at
        right = tirx.Cast("int64", column >= half)
        place = column - right * (columns - half)
        lower = tirx.floordiv(k, short)
        number = weight(tirx.floordiv(place, lanes), i, k - lower * short, tirx.floormod(place, lanes))
        return te.sum(data(*rows, k) * back(2 * lower + right, i) * number, axis=[k, i])

    return te.compute((*list(data.shape)[:-1], columns), element, name="strassen", attrs={ANCHOR: "strassen"})


def strassen_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `strassen`; None when it is something else or not in float32."""
    if fused.notes["kernel"] != "strassen" or str(fused.result.dtype) != "float32":
        return None
    code = Code()
    _Strassen(code, fused, machine).emit()
    return fused.rewritten(code.done())


@dataclass
class _Strassen:
    code: Code
    fused: Fused
    machine: Machine

    def __post_init__(self) -> None:
        self.data, _, self.weight = self.fused.reads
        self.pairs, _, self.depth, self.lanes = (int(size) for size in self.weight.shape)
        self.columns = int(self.fused.result.shape[-1])
        self.rows = Rows.of(self.data.shape)
        self.whole = vector(0, self.lanes)

    def emit(self) -> None:
        self.source, self.flat_weight = flat(self.code, self.data), flat(self.code, self.weight)
        plan, _ = division(self.rows.count, self.columns, 2 * self.depth, self.machine)
        self.chunks = plan.chunks
        self.rows.each_part(self.code, plan, self.pairs, self._task)

    def _task(self, part: Part) -> None:
        code, lanes, half = self.code, self.lanes, -(-part.rows // 2)
        steps = self.depth // self.chunks
        tall, wide = best_tile(half, part.units, self.machine)
        sums = code.scratch("sums", [PRODUCTS, half, steps])
        products = code.scratch("products", [PRODUCTS, half, wide.size, lanes])
        kept = code.scratch("kept", [4, half, part.units if self.chunks > 1 else wide.size, lanes])
        if self.chunks > 1:
            zero = lanes_of(tirx.const(0, "float32"), lanes)
            with code.loop("quarter", 4) as n, code.loop("row", half) as p, code.loop("pair", part.units) as q:
                code.store(kept, [n, p, q, self.whole], zero)
        with code.loop("chunk", self.chunks) as chunk:
            start = code.let("start", chunk * steps)
            self._add_rows(part, sums, start, steps)

            def panel(q: Any, width: int) -> None:
                with code.loop("product", PRODUCTS) as i:
                    each_part(
                        code, "rows", tall, lambda p, t: self._tile((i, p, q), (t, width), part, start, sums, products)
                    )
                self._combine(q if self.chunks > 1 else index(0), width, half, products, kept)
                if self.chunks == 1:
                    self._emit(part, kept, index(0), q, width)

            each_part(code, "pairs", wide, panel)
        if self.chunks > 1:
            self._emit(part, kept, index(0), index(0), part.units)

    def _add_rows(self, part: Part, sums: Any, start: Any, steps: int) -> None:
        """The sums of the quarters of a part's rows, in a chunk of the depth."""
        code, half = self.code, -(-part.rows // 2)
        with code.loop("row", half) as r:
            upper = code.let("upper", (part.first + r) * (2 * self.depth) + start)
            lower = code.let("lower", upper + (part.rows - half) * (2 * self.depth))

            def add(run: Run) -> None:
                a, b, c, d = (
                    code.let("quarter", self.source[vector(line + right + run.start, run.count)])
                    for line in (upper, lower)
                    for right in (0, self.depth)
                )
                for i, value in enumerate((a + d, c + d, a, d, a + b, c - a, b - d)):
                    code.store(sums, [index(i), r, run.places], value)

            each_run(code, steps, self.lanes, add)

    def _tile(
        self, at: tuple[Any, Any, Any], tile: tuple[int, int], part: Part, start: Any, sums: Any, products: Any
    ) -> None:
        code, lanes, (i, p, q), (tall, wide) = self.code, self.lanes, at, tile
        half, steps = (int(size) for size in sums.shape[1:])
        number, unroll = code.let("pair", part.base + q), steps_at_once(steps, self.machine.choices)
        panel = self.depth * lanes
        following = (number * PRODUCTS + i + 1) * panel + start * lanes
        ahead = fetching(
            code,
            self.flat_weight,
            Panels(following, PRODUCTS * panel, steps * lanes, wide),
            (p, tall, half),
            steps // unroll,
            self.machine.choices,
        )
        totals = accumulate(
            code,
            tile,
            lanes,
            [steps],
            lambda r, k: sums[i, p + r, k],
            lambda v, k: self.weight[number + v, i, start + k, self.whole],
            unroll,
            ahead,
        )
        for r, row in enumerate(totals):
            for v, total in enumerate(row):
                code.store(products, [i, p + r, index(v), self.whole], total[self.whole])

    def _combine(self, first: Any, width: int, half: int, products: Any, kept: Any) -> None:
        """The quarters of the result, added to those of the chunks before."""
        code, whole = self.code, self.whole
        with code.loop("row", half) as p:
            for v in range(width):
                m = [code.let("m", products[index(i), p, index(v), whole]) for i in range(PRODUCTS)]
                values = (m[0] + m[3] - m[4] + m[6], m[2] + m[4], m[1] + m[3], m[0] - m[1] + m[2] + m[5])
                for n, value in enumerate(values):
                    place = [index(n), p, first + v, whole]
                    code.store(kept, place, value if self.chunks == 1 else kept[tuple(place)] + value)

    def _emit(self, part: Part, kept: Any, first: Any, q: Any, width: int) -> None:
        """What follows, for the columns of some pairs."""
        code, lanes, half = self.code, self.lanes, int(kept.shape[1])
        for lower, top in enumerate((0, part.rows - half)):
            with code.loop("row", half) as p:
                row = code.let("row_at", part.first + (p + top))
                with code.when(row >= part.fresh):
                    place = self.rows.place(row)
                    with code.loop("pair", width) as v:
                        for right, begin in enumerate((0, self.columns - self.pairs * lanes)):
                            column = code.let("column", (part.base + q + v) * lanes + begin)
                            with code.loop("lane", lanes, "vectorized") as lane:
                                value = kept[index(2 * lower + right), p, first + v, lane]
                                self.fused.epilogue.emit(code, value, [*place, column + lane])


@cache
def division(rows: int, columns: int, depth: int, machine: Machine) -> tuple[Division, float]:
    """The division that was measured to be best, or takes the least time by the model; and how many cycles that are."""
    if machine.choices.division is not None:
        return Division(*machine.choices.division), 0.0
    lanes, pairs, choices = machine.lanes, -(-columns // (2 * machine.lanes)), []
    for plan in divisions(rows, depth // 2, machine):
        block, group, steps = -(-rows // plan.blocks), -(-pairs // plan.groups), depth // 2 // plan.chunks
        # Elements that both halves have would be computed by two tasks, which round differently.
        overlapping = plan.groups > 1 and 2 * pairs * lanes != columns
        if plan.groups > pairs or block < 2 or overlapping:
            continue
        half = -(-block // 2)
        tile = best_tile(half, group, machine)
        results = (PRODUCTS + 4) * tile[1].size if plan.chunks == 1 else 4 * group
        if 4 * half * (PRODUCTS * steps + lanes * results) > machine.l2 * 3 // 4 and block > 2:
            continue
        turns = -(-plan.blocks * plan.groups // machine.threads)
        tiles = PRODUCTS * cycles_of(*tile, machine) * depth / 2
        adding = half * depth / 2 / lanes * (PRODUCTS + 2) + half * group * 24 * plan.chunks
        weights = 4 * PRODUCTS * lanes * depth // 2 * group
        cost = turns * (tiles + adding + waiting(weights, tiles, machine))
        cost += crossing(rows, depth, columns, plan.groups)
        choices.append((cost, plan.blocks * plan.groups, plan))
    cost, _, plan = min(choices, key=lambda choice: choice[:2])
    return plan, cost
