"""Operators that move elements and compute nothing: reshapes, permutations, slices, concatenation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.kernels.concatenation import concatenation
from graphopt.backends.tvm.layout import Ordered, arranged, common_order, ordered, permuted, reshaped, settled
from graphopt.backends.tvm.registry import Call, Refused, converts, normal_axis

aten = torch.ops.aten
op = relax.op


@converts(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    layout="any",
)
def reshape(call: Call, self: Any, **how: Any) -> Any:
    """Every one of these is a reshape to the shape that torch inferred."""
    return reshaped(call, self, call.shape)


@converts(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(call: Call, self: Any, **how: Any) -> Any:
    return op.broadcast_to(self, call.shape)


@converts(aten.permute.default, layout="any")
def permute(call: Call, self: Any, dims: Sequence[int]) -> Any:
    rank = len(ordered(self).order)
    return permuted(self, [normal_axis(axis, rank) for axis in dims])


@converts(aten.transpose.int, layout="any")
def transpose(call: Call, self: Any, dim0: int, dim1: int) -> Any:
    order = list(range(len(ordered(self).order)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(call, self, order)


@converts(aten.t.default, aten.numpy_T.default, layout="any")
def turn(call: Call, self: Any) -> Any:
    return permute(call, self, list(range(len(ordered(self).order)))[::-1])


@converts(aten.movedim.intlist, aten.movedim.int, layout="any")
def movedim(call: Call, self: Any, source: Any, destination: Any) -> Any:
    rank = len(ordered(self).order)
    sources = [normal_axis(a, rank) for a in ([source] if isinstance(source, int) else source)]
    places = [normal_axis(a, rank) for a in ([destination] if isinstance(destination, int) else destination)]
    order = [axis for axis in range(rank) if axis not in sources]
    for place, axis in sorted(zip(places, sources, strict=True)):
        order.insert(place, axis)
    return permute(call, self, order)


def shifted(call: Call, x: Any, source: Callable[[list[Any]], list[Any]], name: str) -> Any:
    """A tensor of the node's shape whose element at an index is x's element at `source(index)`.

    Indices are in torch's order of axes; the result is made in the order that x has, when its rank is the same.
    """
    return moved(call, x, call.shape, source, name)


def moved(call: Call, x: Any, shape: Sequence[Any], source: Callable[[list[Any]], list[Any]], name: str) -> Any:
    """`shifted` to a shape of one's own."""
    known = ordered(x)
    rank = len(shape)
    order = known.order if len(known.order) == rank else tuple(range(rank))

    def element(t: te.Tensor, at: Sequence[Any]) -> Any:
        place = source([at[order.index(axis)] for axis in range(rank)])
        return t(*(place[axis] for axis in known.order))

    def compute(t: te.Tensor) -> te.Tensor:
        return te.compute([shape[axis] for axis in order], lambda *at: element(t, at), name=name)

    return settled(Ordered(call.compute(compute, known.value, name=name), order))


def _along(x: Any, dim: int, place: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    axis = normal_axis(dim, len(ordered(x).shape))
    return lambda index: [place(i) if position == axis else i for position, i in enumerate(index)]


@converts(aten.slice.Tensor, layout="any")
def slice_(call: Call, self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = ordered(self).shape[dim]
    return shifted(call, self, _along(self, dim, _strided(_clipped_start(start, size), step)), "slice")


def _strided(start: Any, step: int) -> Callable[[Any], Any]:
    return lambda i: start + i * step


def _clipped_start(start: Any, size: Any) -> Any:
    """Where a slice begins: negative counts from the end, beyond either end is cut."""
    if start is None:
        return 0
    if isinstance(start, int) and isinstance(size, int):
        return slice(start, None).indices(size)[0]
    if isinstance(start, int):
        return start if start == 0 else tirx.max(size + start, 0) if start < 0 else tirx.min(start, size)
    return tirx.min(tirx.max(tirx.Select(start < 0, start + size, start), 0), size)


@converts(aten.narrow.default, layout="any")
def narrow(call: Call, self: Any, dim: int, start: Any, length: Any) -> Any:
    return slice_(call, self, dim, start)


@converts(aten.select.int, layout="any")
def select(call: Call, self: Any, dim: int, index: Any) -> Any:
    axis = normal_axis(dim, len(ordered(self).shape))
    size = ordered(self).shape[axis]
    negative = index < 0 if isinstance(index, int) else False
    place = index + size if negative else index
    return shifted(call, self, lambda i: [*i[:axis], place, *i[axis:]], "select")


def _parts(call: Call, x: Any, dim: int) -> tuple[Any, ...]:
    """The pieces that torch infers for a split, chunk or unbind, cut one after the other."""
    axis = normal_axis(dim, len(ordered(x).shape))
    start: Any = 0
    pieces = []
    for meta in call.meta:
        shape = call.sizes(meta)
        pieces.append(moved(call, x, shape, _along(x, axis, _strided(start, 1)), "split"))
        start = start + shape[axis]
    return tuple(pieces)


@converts(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    layout="any",
)
def split(call: Call, self: Any, dim: int = 0, **how: Any) -> Any:
    return _parts(call, self, dim)


@converts(aten.unbind.int)
def unbind(call: Call, self: Any, dim: int = 0) -> Any:
    axis = normal_axis(dim, len(ordered(self).shape))
    count = ordered(self).shape[axis]
    if not isinstance(count, int):
        raise Refused("unbind over a dynamic size")
    shape = call.shape

    def take(index: int) -> Any:
        def cut(t: te.Tensor) -> te.Tensor:
            return te.compute(shape, lambda *i: t(*i[:axis], index, *i[axis:]), name="unbind")

        return call.compute(cut, self, name="unbind")

    return tuple(take(index) for index in range(count))


@converts(operator.getitem)
def getitem(call: Call, self: Any, index: int) -> Any:
    value = self[index]
    if value is None:
        raise Refused(f"output {index} of {call.node.args[0]} is not computed")
    return value


@converts(aten.cat.default, aten.concat.default, layout="any")
def cat(call: Call, tensors: Sequence[Any], dim: int = 0) -> Any:
    """An input of shape [0] is ignored, as torch does."""
    rank = len(call.shape)
    joined = [t for t in tensors if ordered(t).shape != [0] or rank == 1]
    order = common_order(joined, rank) or tuple(range(rank))
    parts = [call.cast(arranged(call, t, order), call.dtype) for t in joined]
    if len(parts) == 1:
        return Ordered(parts[0], order)
    axis = order.index(normal_axis(dim, rank))
    whole = call.compute(lambda *t: concatenation(t, axis), *parts, name="concatenation", anchor=True)
    return Ordered(whole, order)


@converts(aten.stack.default)
def stack(call: Call, tensors: Sequence[Any], dim: int = 0) -> Any:
    axis = normal_axis(dim, len(call.shape))
    shape = [1 if position == axis else size for position, size in enumerate(call.shape)]
    return op.concat([call.reshape(call.cast(t, call.dtype), shape) for t in tensors], axis)


@converts(aten.repeat.default, aten.tile.default, layout="any")
def repeat(call: Call, self: Any, **how: Any) -> Any:
    sizes = ordered(self).shape
    lead = len(call.shape) - len(sizes)
    return shifted(
        call, self, lambda i: [tirx.floormod(at, size) for at, size in zip(i[lead:], sizes, strict=True)], "repeat"
    )


@converts(aten.repeat_interleave.self_int, layout="any")
def repeat_interleave(call: Call, self: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
    if dim is None:
        raise Refused("repeat_interleave of a flattened tensor")
    return shifted(call, self, _along(self, dim, lambda i: tirx.floordiv(i, repeats)), "repeat_interleave")


@converts(aten.unfold.default, layout="any")
def unfold(call: Call, self: Any, dimension: int, size: int, step: int) -> Any:
    """Windows along an axis, their elements on a new last axis."""
    axis = normal_axis(dimension, len(ordered(self).shape))
    return shifted(
        call, self, lambda i: [at * step + i[-1] if a == axis else at for a, at in enumerate(i[:-1])], "unfold"
    )


@converts(aten.diagonal.default, layout="any")
def diagonal(call: Call, self: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The diagonal of two axes, put last."""
    rank = len(ordered(self).shape)
    first, second = normal_axis(dim1, rank), normal_axis(dim2, rank)

    def source(i: list[Any]) -> list[Any]:
        rest = iter(i[:-1])
        ends = {first: i[-1] + max(-offset, 0), second: i[-1] + max(offset, 0)}
        return [ends[axis] if axis in ends else next(rest) for axis in range(rank)]

    return shifted(call, self, source, "diagonal")


@converts(aten.flip.default, layout="any")
def flip(call: Call, self: Any, dims: Sequence[int]) -> Any:
    sizes = ordered(self).shape
    axes = {normal_axis(axis, len(sizes)) for axis in dims}
    return shifted(call, self, lambda i: [sizes[a] - 1 - at if a in axes else at for a, at in enumerate(i)], "flip")


@converts(aten.roll.default, layout="any")
def roll(call: Call, self: Any, shifts: Any, dims: Sequence[int] = ()) -> Any:
    sizes = ordered(self).shape
    if not dims:
        raise Refused("roll of a flattened tensor")
    by: dict[int, Any] = {}
    for dim, shift in zip(dims, shifts, strict=True):
        axis = normal_axis(dim, len(sizes))
        by[axis] = by.get(axis, 0) + shift
    return shifted(
        call, self, lambda i: [tirx.floormod(at - by[a], sizes[a]) if a in by else at for a, at in enumerate(i)], "roll"
    )


@converts(aten.pixel_shuffle.default, layout="any")
def pixel_shuffle(call: Call, self: Any, upscale_factor: int) -> Any:
    """[..., C r r, H, W] -> [..., C, H r, W r]."""
    r = upscale_factor

    def source(i: list[Any]) -> list[Any]:
        *lead, c, h, w = i
        channel = c * (r * r) + tirx.floormod(h, r) * r + tirx.floormod(w, r)
        return [*lead, channel, tirx.floordiv(h, r), tirx.floordiv(w, r)]

    return shifted(call, self, source, "pixel_shuffle")


@converts(aten.pixel_unshuffle.default, layout="any")
def pixel_unshuffle(call: Call, self: Any, downscale_factor: int) -> Any:
    """[..., C, H r, W r] -> [..., C r r, H, W]."""
    r = downscale_factor

    def source(i: list[Any]) -> list[Any]:
        *lead, c, h, w = i
        within = tirx.floormod(c, r * r)
        return [
            *lead,
            tirx.floordiv(c, r * r),
            h * r + tirx.floordiv(within, r),
            w * r + tirx.floormod(within, r),
        ]

    return shifted(call, self, source, "pixel_unshuffle")


@converts(aten.channel_shuffle.default, aten.native_channel_shuffle.default, layout="any")
def channel_shuffle(call: Call, self: Any, groups: int) -> Any:
    batch, channels, *spatial = ordered(self).shape
    split_channels = reshaped(call, self, [batch, groups, channels // groups, *spatial])
    turned = permuted(split_channels, [0, 2, 1, *range(3, len(spatial) + 3)])
    return reshaped(call, turned, call.shape)


@converts(aten.tril.default)
def tril(call: Call, self: Any, diagonal: int = 0) -> Any:
    return _triangle(call, self, lambda row, column: column - row <= diagonal)


@converts(aten.triu.default)
def triu(call: Call, self: Any, diagonal: int = 0) -> Any:
    return _triangle(call, self, lambda row, column: column - row >= diagonal)


def _triangle(call: Call, x: Any, kept: Callable[[Any, Any], Any]) -> Any:
    shape, dtype = call.shape, call.dtype

    def compute(t: te.Tensor) -> te.Tensor:
        zero = tirx.const(0, dtype)
        return te.compute(shape, lambda *i: tirx.Select(kept(i[-2], i[-1]), t(*i), zero), name="triangle")

    return call.compute(compute, x, name="triangle")
