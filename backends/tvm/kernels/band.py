"""Copies of a few rows of an image, with the zeros around it, in work space that stays in the cache."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.emit import Code, flat, lanes_of, vector
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.runs import Run, each_run

__all__ = ["copy_band"]


def copy_band(
    code: Code,
    source: Any,
    image: Any,
    first_row: Any,
    rows: int,
    window: Window,
    order: str,
    lanes: int,
    groups: int = 1,
) -> Any:
    """Copy `rows` padded input rows into a new flat buffer: [rows, columns, C], or [rows, C, columns] of planes.

    Args:
        source: data, [N, H, W, C], or planes [N, C, H, W] when `order` is "NCHW".
        image: index of the image.
        first_row: the first row, counted in the input without padding; it may be negative.
        groups: of channels, which lie apart in the buffer: [groups, rows, columns, C / groups]. As the image has them
            the pixels of a group may be so far apart that few of them have room in the first cache.
    """
    if groups > 1:
        return _copy_groups(code, source, image, first_row, rows, window, lanes, groups)
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
            if order == "NCHW":
                size = 1
                lines = [(base + c * columns, ((image * channels + c) * height + row) * width) for c in range(channels)]
            else:
                size, lines = channels, [(base, (image * height + row) * (width * channels))]
            for target, start in lines:
                _zero(code, band, target, before * size, lanes)
                _copy(code, band, target + before * size, source, start, inside * size, lanes)
                end = before + inside
                _zero(code, band, target + end * size, (columns - end) * size, lanes)
        with code.when(tirx.Not(valid)):
            _zero(code, band, base, columns * channels, lanes)
    return band


def _copy_groups(
    code: Code, source: Any, image: Any, first_row: Any, rows: int, window: Window, lanes: int, groups: int
) -> Any:
    """Copy input rows into a new flat buffer [groups, rows, columns, C / groups]."""
    columns, (height, width) = window.extent(1, window.result[1]), window.size
    channels = int(source.shape[3])
    depth = channels // groups
    before = min(window.before[1], columns)
    inside = min(width, columns - before)
    band = code.scratch("band", [rows * columns * channels])

    def place(group: Any, row: Any, column: Any) -> Any:
        return ((group * rows + row) * columns + column) * depth

    with code.loop("band_row", rows) as r:
        row = code.let("source_row", first_row + r)
        valid = tirx.all(row >= 0, row < height)
        with code.when(valid):
            with code.loop("group", groups) as group:
                _zero(code, band, place(group, r, 0), before * depth, lanes)
                _zero(code, band, place(group, r, before + inside), (columns - before - inside) * depth, lanes)
            with code.loop("column", inside) as column, code.loop("group", groups) as group:
                target = code.let("target", place(group, r, before + column))
                start = ((image * height + row) * width + column) * channels + group * depth
                _copy(code, band, target, source, start, depth, min(lanes, depth))
        with code.when(tirx.Not(valid)), code.loop("group", groups) as group:
            _zero(code, band, place(group, r, 0), columns * depth, lanes)
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


def _copy(code: Code, target: Any, start: Any, source: Any, first: Any, length: int, lanes: int) -> None:
    """The pixels of a line lie one after the other, here and there."""
    numbers, first = flat(code, source), code.let("first", first)

    def move(run: Run) -> None:
        code.store(target, vector(start + run.start, run.count), numbers[vector(first + run.start, run.count)])

    each_run(code, length, lanes, move)
