"""Depthwise convolution over channels-last data: every channel by itself, so vectors run along the channels.

A task computes some rows of one image. The columns at the left and right border are told apart while compiling, so
that the code between them never asks; rows beyond the image are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, index, lanes_of, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.tile import Parts, finish

__all__ = ["Depthwise", "depthwise", "depthwise_kernel"]


def depthwise(data: te.Tensor, weight: te.Tensor, window: Window) -> te.Tensor:
    """data [N, H, W, C] and weight [KH, KW, C] -> [N, OH, OW, C], as a specification."""
    kh, kw, channels = (int(size) for size in weight.shape)
    y, x = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    height, width = window.size

    def element(n: Any, oy: Any, ox: Any, c: Any) -> Any:
        row = oy * window.stride[0] + y * window.dilation[0] - window.before[0]
        col = ox * window.stride[1] + x * window.dilation[1] - window.before[1]
        value = data(n, row, col, c)
        if window.padded:
            inside = tirx.all(row >= 0, row < height, col >= 0, col < width)
            value = tirx.if_then_else(inside, value, tirx.const(0, data.dtype))
        return te.sum(value * weight(y, x, c), axis=[y, x])

    notes = {ANCHOR: "depthwise", **window.notes()}
    return te.compute((data.shape[0], *window.result, channels), element, name="depthwise", attrs=notes)


def depthwise_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `depthwise`; None when it is something else, not in float32, or has fewer channels than lanes."""
    if fused.notes["kernel"] != "depthwise" or str(fused.result.dtype) != "float32":
        return None
    data, weight = fused.reads[:2]
    if int(weight.shape[2]) < machine.lanes:
        return None
    code = Code()
    Depthwise(code, fused, data, weight, machine).emit()
    return fused.rewritten(code.done())


Pixels = Callable[[Any, Any, Any, Any], Any]
"""The numbers of a vector of channels at (image, row, column, number of the vector)."""


@dataclass
class Depthwise:
    """Writes the code of a depthwise convolution."""

    code: Code
    fused: Fused
    data: Any
    weight: Any
    machine: Machine

    def __post_init__(self) -> None:
        self.window = Window.read(self.fused.notes)
        self.kh, self.kw, self.channels = (int(size) for size in self.weight.shape)
        self.images = self.data.shape[0]
        self._overlaps = self.channels % self.machine.lanes != 0

    def emit(self) -> None:
        code, (height, _) = self.code, self.window.result
        rows, _ = self._division()
        blocks = -(-height // rows)
        with code.loop("task", self.images * blocks, "parallel") as task:
            image = code.let("image", tirx.floordiv(task, index(blocks)))
            block = tirx.floormod(task, index(blocks))
            top = code.let("top", tirx.min(block * rows, index(height - rows)))
            self.emit_rows(image, top, rows, index(0), -(-self.channels // self.machine.lanes), self._pixels)

    def _division(self) -> tuple[int, int]:
        """Rows of a task, and pixels of a tile."""
        tall = 4 if self.machine.registers <= 16 else 8
        height, known = self.window.result[0], self.machine.choices.division
        if known is not None:
            rows, tall = known
            return rows, tall
        return max(1, min(height, -(-height // (4 * self.machine.threads)))), tall

    def _pixels(self, image: Any, row: Any, column: Any, number: Any) -> Any:
        return self.data[image, row, column, vector(self._channel(number), self.machine.lanes)]

    def _channel(self, number: Any) -> Any:
        """The first channel of a vector. The last vector overlaps the one before rather than reach too far."""
        channel = number * self.machine.lanes
        return tirx.min(channel, index(self.channels - self.machine.lanes)) if self._overlaps else channel

    def emit_rows(self, image: Any, top: Any, rows: int, base: Any, vectors: int, pixels: Pixels) -> None:
        """Some rows of the result, for some vectors of channels."""
        code, width = self.code, self.window.result[1]
        first, last = self._inner_columns()
        _, tall = self._division()
        part = _Part(image, base, vectors, pixels)
        with code.loop("row", rows) as r:
            row = code.let("row_at", top + r)
            for start in range(0, first, tall):
                self._columns(part, row, index(start), min(tall, first - start), start)
            if last > first:
                inner = Parts.of(last - first, tall)
                for size, count, begin in inner.sizes:
                    with code.loop("tile", count) as t:
                        self._columns(part, row, code.let("x", t * size + (first + begin)), size, None)
            for start in range(last, width, tall):
                self._columns(part, row, index(start), min(tall, width - start), start)

    def _inner_columns(self) -> tuple[int, int]:
        """The output columns [first, last) that look at no padding."""
        window, width = self.window, self.window.result[1]
        first = min(width, -(-window.before[1] // window.stride[1]))
        reach = (self.kw - 1) * window.dilation[1] - window.before[1]
        last = (window.size[1] - 1 - reach) // window.stride[1] + 1
        return first, max(first, min(width, last))

    def _columns(self, part: _Part, row: Any, x: Any, count: int, known: int | None) -> None:
        """`count` output columns from `x` on; `known` is x when it is a constant near the border."""
        code, lanes = self.code, self.machine.lanes
        with code.loop("vector", part.vectors) as v:
            number = code.let("number", part.base + v)
            channel = code.let("channel", self._channel(number))
            sums = self._sums(part, row, x, count, known, number)

            def store(p: int, q: int, value: Any, lane: Any) -> None:
                self.fused.epilogue.emit(code, value, [part.image, row, x + p, channel + lane])

            finish(code, sums, lanes, lanes, store)

    def _sums(self, part: _Part, row: Any, x: Any, count: int, known: int | None, number: Any) -> list[list[Any]]:
        code, window, lanes = self.code, self.window, self.machine.lanes
        sums = [code.local(f"sum_{p}", lanes) for p in range(count)]
        for total in sums:
            code.store(total, vector(0, lanes), lanes_of(tirx.const(0, "float32"), lanes))
        for y in range(self.kh):
            source_row = code.let("source_row", row * window.stride[0] + (y * window.dilation[0] - window.before[0]))
            if window.padded:
                with code.when(tirx.all(source_row >= 0, source_row < window.size[0])):
                    self._row(sums, part, source_row, y, x, known, number)
            else:
                self._row(sums, part, source_row, y, x, known, number)
        return [[total] for total in sums]

    def _row(
        self, sums: list[Any], part: _Part, source_row: Any, y: int, x: Any, known: int | None, number: Any
    ) -> None:
        code, window, place = self.code, self.window, vector(0, self.machine.lanes)
        channels = vector(self._channel(number), self.machine.lanes)
        pixels: dict[int, Any] = {}
        weights: dict[int, Any] = {}
        for p, total in enumerate(sums):
            for k in range(self.kw):
                offset = p * window.stride[1] + k * window.dilation[1] - window.before[1]
                if known is not None and not 0 <= known * window.stride[1] + offset < window.size[1]:
                    continue
                if offset not in pixels:
                    column = x * window.stride[1] + offset
                    pixels[offset] = code.let("pixel", part.pixels(part.image, source_row, column, number))
                if k not in weights:
                    weights[k] = code.let("weight", self.weight[index(y), index(k), channels])
                code.store(total, place, total[place] + pixels[offset] * weights[k])


@dataclass(frozen=True)
class _Part:
    """Vectors of channels of an image, and what gives their pixels."""

    image: Any
    base: Any
    vectors: int
    pixels: Pixels
