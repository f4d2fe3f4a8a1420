"""Copies of a few rows of an image, with the zeros around it, in work space that stays in the cache."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.emit import Code, index, lanes_of, vector
from graphopt.backends.tvm.kernels.geometry import Window

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
    inside = min(width, columns - window.before[1])
    band = code.scratch("band", [rows * columns * channels])
    with code.loop("band_row", rows) as r:
        row = code.let("source_row", first_row + r)
        base = code.let("band_at", r * (columns * channels))
        valid = tirx.all(row >= 0, row < height)
        with code.when(valid):
            left = window.before[1] * channels
            right = (columns - window.before[1] - inside) * channels
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
    if channels % lanes == 0:
        with code.loop("x", width) as x, code.loop("c", channels // lanes) as c:
            value = source[(*row, x, vector(c * lanes, lanes))]
            code.store(target, vector(start + x * channels + c * lanes, lanes), value)
        return
    with code.loop("x", width) as x, code.loop("c", channels) as c:
        code.store(target, start + x * channels + c, source[(*row, x, c)])


def _interleave(
    code: Code, target: Any, start: Any, source: Any, image: Any, row: Any, width: int, channels: int
) -> None:
    with code.loop("x", width) as x:
        for c in range(channels):
            code.store(target, start + x * channels + c, source[image, index(c), row, x])
