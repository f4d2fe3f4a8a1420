"""Copies of a few rows of an image, with the zeros around it, in work space that stays in the cache."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.emit import Code, flat, index, lanes_of, vector
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.runs import Run, each_run

__all__ = ["copy_band"]


def copy_band(
    code: Code, source: Any, image: Any, first_row: Any, rows: int, window: Window, order: str, lanes: int
) -> Any:
    """Copy `rows` padded input rows into a new flat buffer [rows, columns, C].

    Args:
        source: data, [N, H, W, C], or [N, C, H, W] when `order` is "NCHW".
        image: index of the image.
        first_row: the first row, counted in the input without padding; it may be negative.
    """
    columns = window.extent(1, window.result[1])
    channels = int(source.shape[1 if order == "NCHW" else 3])
    height, width = window.size
    before = min(window.before[1], columns)  # an output may look at nothing but padding
    inside = min(width, columns - before)
    band = code.scratch("band", [rows * columns * channels])
    with code.loop("band_row", rows) as r:
        row = code.let("source_row", first_row + r)
        base = code.let("band_at", r * (columns * channels))
        valid = tirx.all(row >= 0, row < height)
        with code.when(valid):
            left = before * channels
            right = (columns - before - inside) * channels
            _zero(code, band, base, left, lanes)
            if order == "NCHW":
                _interleave(code, band, base + left, source, image, row, inside, channels)
            else:
                _copy(code, band, base + left, source, (image, row), inside, channels, lanes)
            _zero(code, band, base + (left + inside * channels), right, lanes)
        with code.when(tirx.Not(valid)):
            _zero(code, band, base, columns * channels, lanes)
    return band


def _zero(code: Code, target: Any, start: Any, length: int, lanes: int) -> None:
    zero = tirx.const(0, target.dtype)
    whole = length // lanes
    if whole:
        with code.loop("i", whole) as i:
            code.store(target, vector(start + i * lanes, lanes), lanes_of(zero, lanes))
    if length % lanes:
        with code.loop("i", length % lanes) as i:
            code.store(target, start + whole * lanes + i, zero)


def _copy(
    code: Code, target: Any, start: Any, source: Any, row: tuple[Any, Any], width: int, channels: int, lanes: int
) -> None:
    """The pixels of a row lie one after the other, here and there."""
    lines, (image, line) = flat(code, source), row
    first = code.let("first", (image * source.shape[1] + line) * (int(source.shape[2]) * channels))

    def move(run: Run) -> None:
        code.store(target, vector(start + run.start, run.count), lines[vector(first + run.start, run.count)])

    each_run(code, width * channels, lanes, move)


def _interleave(
    code: Code, target: Any, start: Any, source: Any, image: Any, row: Any, width: int, channels: int
) -> None:
    with code.loop("x", width) as x:
        for c in range(channels):
            code.store(target, start + x * channels + c, source[image, index(c), row, x])
