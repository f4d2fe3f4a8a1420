"""A 1x1 convolution and the depthwise one that follows it, in one kernel.

Inverted residual blocks (Sandler et al., "MobileNetV2", CVPR 2018) expand an image to many channels, which only the
depthwise convolution reads. Channels do not meet there: a task computes one or a few vectors of them for some rows of
the image, in work space that stays in the cache, and their depthwise convolution from it, and then the next ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE
from graphopt.backends.tvm.kernels.depthwise import Depthwise
from graphopt.backends.tvm.kernels.emit import Code, flat, index, vector
from graphopt.backends.tvm.kernels.fused import Fused, read_chain
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import column_of
from graphopt.backends.tvm.kernels.product import division as product_division
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

__all__ = ["CHAIN", "expanded_kernel"]

CHAIN = ("product", "depthwise")
"""What the two anchors compute."""

_BYTES_PER_CYCLE, _L2_BYTES_PER_CYCLE = 8, 32
"""What one core writes to or reads from the third-level cache, and the second."""


def expanded_kernel(function: Any, machine: Machine) -> Any | None:
    """The kernel of a function of both; None when it is something else, or faster in two."""
    chain = read_chain(function)
    if chain is None:
        return None
    first, second = chain
    kinds = (first.notes["kernel"], second.notes["kernel"])
    if kinds != CHAIN or {str(f.result.dtype) for f in chain} != {"float32"}:
        return None
    code = Code()
    kernel = _Expanded(code, first, second, machine)
    known = kernel.window, kernel.depth, kernel.vectors, machine
    found = _plan(*known) if kernel.channels >= machine.lanes == kernel.lanes else None
    if found is None or not (machine.choices != RULES_CHOOSE or _repays(found[1], *known)):
        return None
    kernel.emit(found[0])
    return first.rewritten(code.done())


@dataclass(frozen=True)
class _Plan:
    """Rows of the result and vectors of channels that a task computes."""

    rows: int
    vectors: int


@dataclass
class _Expanded:
    code: Code
    first: Fused
    second: Fused
    machine: Machine

    def __post_init__(self) -> None:
        self.data, self.matrix = self.first.reads[:2]
        self.between, weight = self.second.reads[:2]
        self.depthwise = Depthwise(self.code, self.second, self.between, weight, self.machine.untold())
        self.window = self.depthwise.window
        self.vectors, self.depth, self.lanes = (int(size) for size in self.matrix.shape)
        self.channels, self.images = self.depthwise.channels, self.data.shape[0]

    def emit(self, plan: _Plan) -> None:
        code, height = self.code, self.window.result[0]
        self.source, self.flat_matrix = flat(code, self.data), flat(code, self.matrix)
        blocks, groups = -(-height // plan.rows), -(-self.vectors // plan.vectors)
        tasks = blocks * groups
        with code.loop("task", self.images * tasks, "parallel") as task:
            image = code.let("image", tirx.floordiv(task, index(tasks)))
            place = code.let("place", tirx.floormod(task, index(tasks)))
            block, group = tirx.floordiv(place, index(groups)), tirx.floormod(place, index(groups))
            top = code.let("top", tirx.min(block * plan.rows, index(height - plan.rows)))
            base = code.let("base", tirx.min(group * plan.vectors, index(self.vectors - plan.vectors)))
            self._task(image, top, base, plan)

    def _task(self, image: Any, top: Any, base: Any, plan: _Plan) -> None:
        code, lanes, (height, width) = self.code, self.lanes, self.window.size
        needed = _needed(self.window, plan.rows)
        start = top * self.window.stride[0] - self.window.before[0]
        start = code.let("start", tirx.max(tirx.min(start, index(height - needed)), index(0)))
        tall, wide = best_tile(needed * width, plan.vectors, self.machine)
        band = code.scratch("band", [needed * width, wide.size, lanes])

        def columns(q: Any, wide: int) -> None:
            number = code.let("first_vector", base + q)
            each_part(code, "pixels", tall, lambda p, tall: self._tile(band, image, start, (p, number), (tall, wide)))

            def pixels(_image: Any, row: Any, column: Any, channels: Any) -> Any:
                return band[(row - start) * width + column, channels - number, vector(0, lanes)]

            self.depthwise.emit_rows(image, top, plan.rows, number, wide, pixels)

        each_part(code, "vectors", wide, columns)

    def _tile(self, band: Any, image: Any, start: Any, at: tuple[Any, Any], tile: tuple[int, int]) -> None:
        """Some pixels of the expanded image, from the row `start` on, for some vectors of channels."""
        code, lanes, (p, number), (height, width) = self.code, self.lanes, at, self.window.size
        pixels = int(band.shape[0])
        pixel = code.let("pixel", (image * height + start) * width + p)

        def left(i: int, k: Any) -> Any:
            return self.source[(pixel + i) * self.depth + k]

        def right(j: int, k: Any) -> Any:
            return self.matrix[number + j, k, vector(0, lanes)]

        choices, panel = self.machine.choices, tile[1] * self.depth * lanes
        steps = steps_at_once(self.depth, choices)
        panels = Panels.side_by_side((number + tile[1]) * (self.depth * lanes), panel)
        ahead = fetching(code, self.flat_matrix, panels, (p, tile[0], pixels), self.depth // steps, choices)
        sums = accumulate(code, tile, lanes, [self.depth], left, right, steps, ahead)
        starts = [column_of(code, number + j, self.channels, lanes) for j in range(tile[1])]

        def store(i: int, j: int, value: Any, lane: Any) -> None:
            row, column = tirx.floordiv(p + i, index(width)), tirx.floormod(p + i, index(width))
            place = [image, start + row, column, starts[j] + lane]
            code.store(band, [p + i, j, lane], self.first.epilogue.value(value, place))

        finish(code, sums, lanes, lanes, store)


def _needed(window: Window, rows: int) -> int:
    """Rows of the image that so many rows of the result look at, at most."""
    return min(window.extent(0, rows), window.size[0])


@cache
def _plan(window: Window, depth: int, vectors: int, machine: Machine) -> tuple[_Plan, float] | None:
    """The plan measured to be best, or of the least time by the model, and its cycles; None when no row fits."""
    if machine.choices.division is not None:
        return _Plan(*machine.choices.division), 0.0
    height, choices = window.result[0], []
    for rows in {-(-height // blocks) for blocks in range(1, height + 1)}:
        pixels = _needed(window, rows) * window.size[1]
        for group in {-(-vectors // groups) for groups in range(1, vectors + 1)}:
            tile = best_tile(pixels, group, machine)
            band = 4 * pixels * tile[1].size * machine.lanes
            if band > machine.l2 // 2:
                continue
            turns = -(-(-(-height // rows) * -(-vectors // group)) // machine.threads)
            tiles = cycles_of(*tile, machine) * depth + pixels * group
            reading = 4 * pixels * depth / _BYTES_PER_CYCLE
            beyond = 2 * band / _L2_BYTES_PER_CYCLE if band > machine.l1 // 2 else 0
            cost = turns * (max(tiles, reading) + reading / 8 + beyond + _depthwise(window, rows, group))
            choices.append((cost, -rows, group))
    if not choices:
        return None
    cost, rows, group = min(choices)
    return _Plan(-rows, group), cost


def _repays(cost: float, window: Window, depth: int, vectors: int, machine: Machine) -> bool:
    """Whether one kernel of this cost takes less than two, which write and read what is between them."""
    pixels, threads = math.prod(window.size), machine.threads
    _, apart = product_division(pixels, vectors, depth, machine)
    moved = 2 * 4 * pixels * vectors * machine.lanes / _BYTES_PER_CYCLE / threads
    return cost < apart + _depthwise(window, -(-window.result[0] // threads), vectors) + moved


def _depthwise(window: Window, rows: int, vectors: int) -> float:
    """Cycles of the depthwise convolution."""
    return rows * window.result[1] * vectors * (math.prod(window.kernel) + 4)
