"""Direct convolution, grouped or not, over channels-last data.

A task computes some rows of one image for a group of channels. It first copies the input rows that it needs, with the
zeros around the image, into work space, so that the innermost code never asks where the border is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.band import copy_band
from graphopt.backends.tvm.kernels.emit import Code, flat, index, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import column_of
from graphopt.backends.tvm.kernels.rows import crossing
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

__all__ = ["convolution", "convolution_kernel"]


def convolution(
    data: te.Tensor, weight: te.Tensor, channels: int, groups: int, window: Window, order: str = "NHWC"
) -> te.Tensor:
    """Data [N, H, W, C] (or [N, C, H, W] by `order`) and a packed weight to [N, OH, OW, channels].

    The weight is [groups * vectors, KH, KW, C / groups, lanes].
    """
    _, kh, kw, depth, lanes = (int(size) for size in weight.shape)
    per_group, vectors = channels // groups, int(weight.shape[0]) // groups
    y, x, k = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx"), te.reduce_axis((0, depth), "k")
    height, width = window.size

    def pixel(n: Any, row: Any, column: Any, c: Any) -> Any:
        place = (n, c, row, column) if order == "NCHW" else (n, row, column, c)
        if not window.padded:
            return data(*place)
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        return tirx.if_then_else(inside, data(*place), tirx.const(0, data.dtype))

    def element(n: Any, oy: Any, ox: Any, o: Any) -> Any:
        group, column = tirx.floordiv(o, per_group), tirx.floormod(o, per_group)
        number = tirx.floordiv(column, lanes)
        lane = column - tirx.min(number * lanes, max(per_group - lanes, 0))
        row = oy * window.stride[0] + y * window.dilation[0] - window.before[0]
        col = ox * window.stride[1] + x * window.dilation[1] - window.before[1]
        value = pixel(n, row, col, group * depth + k)
        return te.sum(value * weight(group * vectors + number, y, x, k, lane), axis=[y, x, k])

    notes = {ANCHOR: "convolution", "graphopt.groups": groups, "graphopt.order": order, **window.notes()}
    return te.compute((data.shape[0], *window.result, channels), element, name="convolution", attrs=notes)


def convolution_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `convolution`; None when it is something else or not in float32."""
    if fused.notes["kernel"] != "convolution" or str(fused.result.dtype) != "float32":
        return None
    code = Code()
    data, weight = fused.reads[:2]
    _Convolution(code, fused, data, weight, machine).emit()
    return fused.rewritten(code.done())


@dataclass
class _Convolution:
    code: Code
    fused: Fused
    data: Any
    weight: Any
    machine: Machine

    def __post_init__(self) -> None:
        notes = self.fused.notes
        self.window = Window.read(notes)
        self.groups, self.order = int(notes["groups"]), str(notes["order"])
        numbers, self.kh, self.kw, self.depth, self.lanes = (int(size) for size in self.weight.shape)
        self.machine = self.machine.of_lanes(self.lanes)
        self.vectors = numbers // self.groups
        self.inputs = self.depth * self.groups
        self.outputs = int(self.fused.result.shape[-1]) // self.groups
        self.images = self.data.shape[0]
        self.banded = self.window.padded or self.order == "NCHW"
        self.planes = self.order == "NCHW"
        self.apart = self.groups if self.banded and not self.planes else 1
        self.pixel = self.inputs // self.apart
        self.run_together = self.groups == self.apart and self.window.dilation[1] == 1 and not self.planes

    def emit(self) -> None:
        code, (height, width) = self.code, self.window.result
        rows, parts = self._division()
        blocks = -(-height // rows)
        if not self.banded:
            self.source = flat(code, self.data)
        self.flat_weight = flat(code, self.weight)
        group_vectors = -(-self.vectors // parts)
        self.tall, self.wide = best_tile(width, group_vectors, self.machine)
        tasks = blocks * parts
        with code.loop("task", self.images * tasks, "parallel") as task:
            image = code.let("image", tirx.floordiv(task, index(tasks)))
            place = code.let("place", tirx.floormod(task, index(tasks)))
            first = code.let("first_row", tirx.min(tirx.floordiv(place, index(parts)) * rows, index(height - rows)))
            base = code.let(
                "base",
                tirx.min(tirx.floormod(place, index(parts)) * group_vectors, index(self.vectors - group_vectors)),
            )
            self._task(image, first, rows, base)

    def _task(self, image: Any, first: Any, rows: int, base: Any) -> None:
        code, window = self.code, self.window
        width = window.result[1]
        if self.banded:
            top = first * window.stride[0] - window.before[0]
            needed = window.extent(0, rows)
            self.source = copy_band(code, self.data, image, top, needed, window, self.order, self.lanes, self.apart)
            self.row_length, origin = window.extent(1, window.result[1]), index(0)
            self.group_step = needed * self.row_length * self.pixel
        else:
            self.row_length = window.size[1]
            origin = (image * window.size[0] + first * window.stride[0]) * self.row_length
        origin = code.let("origin", origin)
        with code.loop("group", self.groups) as group:

            def columns(q: Any, wide: int) -> None:
                with code.loop("row", rows) as row:
                    start = code.let("start", origin + row * (window.stride[0] * self.row_length))
                    each_part(
                        code,
                        "column",
                        self.tall,
                        lambda x, tall: self._tile(
                            image, first + row, x, start, group, base + q, tall, wide, (row * width + x, rows * width)
                        ),
                    )

            each_part(code, "vectors", self.wide, columns)

    def _tile(
        self,
        image: Any,
        row: Any,
        x: Any,
        start: Any,
        group: Any,
        number: Any,
        tall: int,
        wide: int,
        passed: tuple[Any, int],
    ) -> None:
        code, window, lanes = self.code, self.window, self.lanes
        number = code.let("first_vector", number)
        pixel, channel = (1, self.row_length) if self.planes else (self.pixel, 1)  # how far the next one is
        first = x * (window.stride[1] * pixel) + group * (self.group_step if self.apart > 1 else self.depth * channel)
        corner = code.let("corner", start * self.pixel + first)
        step_y = window.dilation[0] * self.row_length * self.pixel

        def left(p: int, y: Any, *k: Any) -> Any:
            offset = k[0] if self.run_together else k[0] * (window.dilation[1] * pixel) + k[1] * channel
            return self.source[corner + p * (window.stride[1] * pixel) + y * step_y + offset]

        def right(q: int, y: Any, *k: Any) -> Any:
            if self.run_together:
                k = (tirx.floordiv(k[0], index(self.depth)), tirx.floormod(k[0], index(self.depth)))
            return self.weight[group * self.vectors + number + q, y, k[0], k[1], vector(0, lanes)]

        extents = [self.kh, self.kw * self.depth] if self.run_together else [self.kh, self.kw, self.depth]
        choices = self.machine.choices
        steps, unroll = math.prod(extents), extents[-1] if self.planes else steps_at_once(extents[-1], choices)
        following = (group * self.vectors + number + wide) * (steps * lanes)
        panels = Panels.side_by_side(following, wide * steps * lanes)
        ahead = fetching(code, self.flat_weight, panels, (passed[0], tall, passed[1]), steps // unroll, choices)
        sums = accumulate(code, (tall, wide), lanes, extents, left, right, unroll, ahead)
        starts = [
            code.let("channel", group * self.outputs + column_of(code, number + q, self.outputs, lanes))
            for q in range(wide)
        ]

        def store(p: int, q: int, value: Any, lane: Any) -> None:
            self.fused.epilogue.emit(code, value, [image, row, x + p, starts[q] + lane])

        finish(code, sums, lanes, min(lanes, self.outputs), store)

    def _division(self) -> tuple[int, int]:
        """Rows of a task, and into how many groups of channels to divide them."""
        if self.machine.choices.division is not None:
            rows, parts = self.machine.choices.division
            return rows, parts
        height, width = self.window.result
        lanes, threads = self.lanes, self.machine.threads
        row_bytes = 4 * self.inputs * self.window.extent(1, width)
        choices = []
        for rows in range(1, height + 1):
            needed = self.window.extent(0, rows)
            if rows > 1 and needed * row_bytes > self.machine.l2 // 2:
                break
            for parts in {1, threads}:
                if parts > self.vectors:
                    continue
                vectors = -(-self.vectors // parts)
                turns = -(-(-(-height // rows) * parts) // threads)
                steps = self.kh * self.kw * self.depth * self.groups
                compute = rows * cycles_of(*best_tile(width, vectors, self.machine), self.machine) * steps
                weights = 4 * lanes * vectors * steps / 16
                band = needed * row_bytes / 16 if self.banded else 0
                shared = crossing(height * width, self.inputs, self.outputs * self.groups, parts)
                choices.append((turns * (compute + weights + band) + shared, rows, parts))
        return min(choices)[1:]
