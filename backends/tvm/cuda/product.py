"""Convolutions and matrix products on tensor cores: the launch and the epilogue around product.cuh."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.cuda.emit import GpuCode
from graphopt.backends.tvm.cuda.gpu import Gpu
from graphopt.backends.tvm.cuda.tiles import Tile, best_tile
from graphopt.backends.tvm.kernels.emit import flat, index, unravelled
from graphopt.backends.tvm.kernels.fused import Fused
from graphopt.backends.tvm.kernels.geometry import Window

__all__ = ["product_kernel"]

_TYPES = {"float16": "half", "bfloat16": "nv_bfloat16", "float32": "float"}
_SKEW = 8

Expr = Any


@dataclass(frozen=True)
class _Operand:
    """One side of a product.

    Attributes:
        buffer: where its numbers are.
        code: its type in product.cuh.
        starts: strides of the leading axes of the result in it: where the matrix of a batch starts.
    """

    buffer: Any
    code: str
    starts: tuple[int, ...]


@dataclass(frozen=True)
class _Product:
    """A batch of products [rows, depth] by [columns, depth].

    Attributes:
        lead: sizes of the batch's axes.
        rows: sizes of the axes of the result that make a row's number.
        groups: how many products lie side by side along the columns of the result.
    """

    left: _Operand
    right: _Operand
    lead: tuple[int, ...]
    rows: tuple[Any, ...]
    columns: int
    depth: int
    groups: int


def product_kernel(fused: Fused, gpu: Gpu) -> Any | None:
    """The kernel of `convolution` and `matmul`; None when it is something else."""
    readers = {"gpu.convolution": _convolution, "gpu.matmul": _matmul}
    reader = readers.get(str(fused.notes["kernel"]))
    product = None if reader is None else reader(fused)
    if product is None:
        return None
    code = GpuCode()
    _emit(code, fused, product, _tile(product, gpu))
    return fused.rewritten(code.done())


def _tile(product: _Product, gpu: Gpu) -> Tile:
    rows = math.prod(int(size) if isinstance(size, tirx.IntImm) else 8 for size in product.rows)
    width = 4 if str(product.left.buffer.dtype) == "float32" else 2
    batch = math.prod(product.lead) * product.groups
    return best_tile(rows, product.columns, batch, product.depth * width, gpu.clusters)


def _emit(code: GpuCode, fused: Fused, product: _Product, tile: Tile) -> None:
    total = functools.reduce(operator.mul, product.rows, index(1))
    down = tirx.floordiv(total + (tile.rows - 1), index(tile.rows))
    across = -(-product.columns // tile.columns) * product.groups
    extents = {"block_x": down, "block_y": across, "block_z": math.prod(product.lead) * tile.parts}
    clusters = {"cluster_z": tile.parts} if tile.parts > 1 else {}
    with code.launched(**extents, **clusters, thread_x=tile.threads) as at:
        sums = code.shared("tile", tile.shared_bytes // 4)
        part = tirx.floormod(at["block_z"], tile.parts)
        heads = unravelled(code, tirx.floordiv(at["block_z"], tile.parts), list(product.lead))
        strips = -(-product.columns // tile.columns)
        group, strip = tirx.floordiv(at["block_y"], strips), tirx.floormod(at["block_y"], strips)
        places = [_start(code, operand, heads, group, product) for operand in (product.left, product.right)]
        row, column = at["block_x"] * tile.rows, strip * tile.columns
        numbers = (tirx.Cast("int32", total), tirx.const(product.columns, "int32"), row, column, part)
        code.call(_instance(product, tile), *places, *numbers, tirx.address_of(sums[0]), headers=("product.cuh",))
        first = group * product.columns
        _finish(code, fused, product, tile, (heads, row, column, first, part, total, sums, at["thread_x"]))


def _instance(product: _Product, tile: Tile) -> str:
    sizes = (tile.rows, tile.columns, tile.warp_rows, tile.warp_columns, tile.stages, tile.parts)
    kind = _TYPES[str(product.left.buffer.dtype)]
    parts = [kind, product.left.code, product.right.code, *map(str, sizes)]
    return f"graphopt::product<{', '.join(parts)}>"


def _start(code: GpuCode, operand: _Operand, heads: Sequence[Expr], group: Expr, product: _Product) -> Expr:
    """The address of the first number of the matrix that a block needs."""
    strides = operand.starts
    offset = group * strides[-1] if product.groups > 1 else index(0)
    for head, stride in zip(heads, strides, strict=False):
        offset = offset + index(head) * stride
    return tirx.address_of(flat(code, operand.buffer)[offset])


def _finish(code: GpuCode, fused: Fused, product: _Product, tile: Tile, state: tuple[Any, ...]) -> None:
    """Every number of the tile through the epilogue to its place; a warp writes neighbouring columns."""
    heads, row, column, first, part, total, sums, thread = state
    share = tile.rows // tile.parts
    with code.loop("turn", share * tile.columns // tile.threads) as turn:
        number = tirx.Cast("int32", turn) * tile.threads + thread
        high = code.let("high", part * share + tirx.floordiv(number, tile.columns))
        wide = code.let("wide", tirx.floormod(number, tile.columns))
        value = sums[high * (tile.columns + _SKEW) + wide]
        inside = tirx.all(row + high < tirx.Cast("int32", total), column + wide < product.columns)
        with code.when(inside):
            rows = unravelled(code, index(row + high), list(product.rows))
            fused.epilogue.emit(code, value, [*heads, *rows, index(first + column + wide)])


def _convolution(fused: Fused) -> _Product | None:
    data, weight = fused.reads[:2]
    window, groups, order = Window.read(fused.notes), int(fused.notes["groups"]), str(fused.notes["order"])
    sizes = dict(zip(order, data.shape, strict=True))
    height, width, channels = (int(sizes[axis]) for axis in "HWC")
    strides = {"NHWC": (1, width * channels, channels), "NCHW": (height * width, width, 1)}[order]
    outputs, pitch = (int(size) for size in weight.shape)
    depth = channels // groups
    numbers = (
        *(depth, height, width, *window.kernel, *window.stride, *window.before, *window.dilation, *window.result),
        *(height * width * channels, *strides),
    )
    kind = _TYPES[str(data.dtype)]
    simple = window.kernel == window.stride == (1, 1) and not window.padded and order == "NHWC"
    left = f"graphopt::Window<{kind}, {', '.join(map(str, numbers))}>"
    if simple:
        left = f"graphopt::Matrix<{kind}, {depth}, {channels}, 1>"
    right = f"graphopt::Matrix<{kind}, {pitch}, {pitch}, 1>"
    return _Product(
        _Operand(data, left, (depth * strides[0],)),
        _Operand(weight, right, (outputs // groups * pitch,)),
        (),
        tuple(fused.result.shape[:-1]),
        outputs // groups,
        depth * math.prod(window.kernel),
        groups,
    )


def _matmul(fused: Fused) -> _Product | None:
    if len(fused.reads) != 2:
        return None  # a matrix times itself
    orders = [[int(axis) for axis in order] for order in str(fused.notes["orders"]).split(",")]
    *lead, rows, columns = fused.result.shape
    sides = [_strides(buffer, order) for buffer, order in zip(fused.reads, orders, strict=True)]
    (left, right), (of_left, of_right) = fused.reads, (tuple(side) for side in sides)
    row_axes = [rows]
    if len(of_right) == 2 and orders[0] == sorted(orders[0]):
        row_axes, lead = [*lead, rows], []  # one matrix for all: the leading axes are rows as well
    elif not all(isinstance(size, tirx.IntImm) for size in lead) or None in of_left or None in of_right:
        return None
    depth = int(left.shape[orders[0].index(len(orders[0]) - 1)])
    kind = _TYPES.get(str(left.dtype))
    if kind is None or str(right.dtype) != str(left.dtype):
        return None
    a = f"graphopt::Matrix<{kind}, {depth}, {of_left[-2]}, {of_left[-1]}>"
    b = f"graphopt::Matrix<{kind}, {depth}, {of_right[-1]}, {of_right[-2]}>"
    starts = [
        _leading(side, buffer, order, len(lead))
        for side, buffer, order in zip((of_left, of_right), fused.reads, orders, strict=True)
    ]
    sizes = tuple(int(size) for size in lead)
    return _Product(
        _Operand(left, a, starts[0]), _Operand(right, b, starts[1]), sizes, tuple(row_axes), int(columns), depth, 1
    )


def _strides(buffer: Any, order: Sequence[int]) -> list[int | None]:
    """How far apart neighbours along each axis of the tensor lie; None where that is not fixed."""
    found: list[int | None] = [None] * len(order)
    step: int | None = 1
    for place in reversed(range(len(order))):
        found[order[place]] = step
        size = buffer.shape[place]
        step = step * int(size) if step is not None and isinstance(size, tirx.IntImm) else None
    return found


def _leading(strides: Sequence[int | None], buffer: Any, order: Sequence[int], count: int) -> tuple[int, ...]:
    """Strides along the leading axes of the result; zero where the operand is repeated."""
    own = len(order) - 2
    starts = [0] * count
    for axis in range(own):
        place = count - own + axis
        if place >= 0 and int(buffer.shape[order.index(axis)]) != 1:
            starts[place] = strides[axis] or 0
    return tuple(starts)
