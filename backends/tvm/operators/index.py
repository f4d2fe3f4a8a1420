"""Gathering and scattering. A negative index counts from the end; one out of range, which torch refuses when it runs,
is moved to the nearest valid one, so that a compiled graph never reads outside its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.registry import Call, Refused, converts, dtype_of, normal_axis, shape_of

aten = torch.ops.aten
op = relax.op


def _valid(index: Any, size: Any) -> Any:
    wrapped = tirx.Select(index < 0, index + size, index)
    return tirx.max(tirx.min(wrapped, size - 1), 0)


def _as_index(call: Call, value: Any) -> Any:
    if dtype_of(value) in ("bool", "uint8"):
        raise Refused("indexing with a boolean mask, whose result has a size known only when it runs")
    return call.cast(value, "int64")


@converts(aten.embedding.default)
def embedding(
    call: Call, weight: Any, indices: Any, padding_idx: Any = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    rows, shape = shape_of(weight)[0], call.shape

    def compute(w: te.Tensor, i: te.Tensor) -> te.Tensor:
        return te.compute(shape, lambda *at: w(_valid(i(*at[:-1]), rows), at[-1]), name="embedding")

    return call.compute(compute, weight, _as_index(call, indices), name="embedding")


@converts(aten.index_select.default)
def index_select(call: Call, self: Any, dim: int, index: Any) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    size, shape = shape_of(self)[axis], call.shape
    index = call.reshape(_as_index(call, index), [shape[axis]])

    def compute(x: te.Tensor, i: te.Tensor) -> te.Tensor:
        return te.compute(shape, lambda *at: x(*at[:axis], _valid(i(at[axis]), size), *at[axis + 1 :]), name="select")

    return call.compute(compute, self, index, name="index_select")


@converts(aten.gather.default)
def gather(call: Call, self: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    if not shape_of(self):
        return self
    axis = normal_axis(dim, len(shape_of(self)))
    size, shape = shape_of(self)[axis], call.shape

    def compute(x: te.Tensor, i: te.Tensor) -> te.Tensor:
        return te.compute(shape, lambda *at: x(*at[:axis], _valid(i(*at), size), *at[axis + 1 :]), name="gather")

    return call.compute(compute, self, _as_index(call, index), name="gather")


@converts(aten.index.Tensor)
def index_tensor(call: Call, self: Any, indices: Sequence[Any]) -> Any:
    """Advanced indexing. The index axes stand where the first index does, or in front when indices are apart."""
    used = {axis: _as_index(call, index) for axis, index in enumerate(indices) if index is not None}
    axes = sorted(used)
    together = axes == list(range(axes[0], axes[-1] + 1))
    first = axes[0] if together else 0
    sizes, shape = shape_of(self), call.shape
    width = max(len(shape_of(index)) for index in used.values())
    index_shapes = {axis: shape_of(index) for axis, index in used.items()}

    def compute(x: te.Tensor, *tables: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            where, rest = at[first : first + width], iter([*at[:first], *at[first + width :]])
            source = []
            for axis, size in enumerate(sizes):
                if axis not in used:
                    source.append(next(rest))
                    continue
                table, own = tables[axes.index(axis)], index_shapes[axis]
                place = where[width - len(own) :]
                picked = table(*(0 if isinstance(n, int) and n == 1 else i for i, n in zip(place, own, strict=True)))
                source.append(_valid(picked, size))
            return x(*source)

        return te.compute(shape, element, name="index")

    return call.compute(compute, self, *(used[axis] for axis in axes), name="index")


@converts(aten.scatter.src)
def scatter(call: Call, self: Any, dim: int, index: Any, src: Any) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    return op.scatter_elements(self, _as_index(call, index), _cut_to(call, src, index), axis)


@converts(aten.scatter.value)
def scatter_value(call: Call, self: Any, dim: int, index: Any, value: Any) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    updates = call.emit(op.full(shape_of(index), relax.const(value, call.dtype), call.dtype))
    return op.scatter_elements(self, _as_index(call, index), updates, axis)


@converts(aten.scatter_add.default)
def scatter_add(call: Call, self: Any, dim: int, index: Any, src: Any) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    return op.scatter_elements(self, _as_index(call, index), _cut_to(call, src, index), axis, "add")


def _cut_to(call: Call, src: Any, index: Any) -> Any:
    """The corner of `src` that the index covers."""
    shape = shape_of(index)
    if shape_of(src) == shape:
        return src
    return call.compute(lambda t: te.compute(shape, lambda *i: t(*i), name="corner"), src, name="corner")


@converts(aten.slice_scatter.default)
def slice_scatter(
    call: Call, self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    size, shape = shape_of(self)[axis], call.shape
    if not (isinstance(size, int) and isinstance(start, int | None) and isinstance(end, int | None)):
        raise Refused("slice_scatter with dynamic bounds")
    first, last, _ = slice(start, end, step).indices(size)
    if first >= last:
        return self

    def compute(x: te.Tensor, s: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            offset = at[axis] - first
            inside = tirx.all(at[axis] >= first, at[axis] < last, tirx.floormod(offset, step) == 0)
            source = [tirx.floordiv(offset, step) if a == axis else i for a, i in enumerate(at)]
            return tirx.if_then_else(inside, s(*source), x(*at))

        return te.compute(shape, element, name="slice_scatter")

    return call.compute(compute, self, call.cast(src, call.dtype), name="slice_scatter")


@converts(aten.select_scatter.default)
def select_scatter(call: Call, self: Any, src: Any, dim: int, index: Any) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    size, shape = shape_of(self)[axis], call.shape
    place = index + size if isinstance(index, int) and index < 0 else index

    def compute(x: te.Tensor, s: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            return tirx.if_then_else(at[axis] == place, s(*at[:axis], *at[axis + 1 :]), x(*at))

        return te.compute(shape, element, name="select_scatter")

    return call.compute(compute, self, call.cast(src, call.dtype), name="select_scatter")


@converts(aten.diff.default)
def diff(call: Call, self: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    if call.dtype == "bool":
        raise Refused("diff of booleans")
    parts = [call.cast(part, call.dtype) for part in (prepend, self, append) if part is not None]
    whole = call.emit(op.concat(parts, axis)) if len(parts) > 1 else parts[0]
    if n != 1:
        raise Refused(f"diff of order {n}")
    shape = call.shape

    def compute(x: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            left, right = x(*at), x(*at[:axis], at[axis] + 1, *at[axis + 1 :])
            return right - left

        return te.compute(shape, element, name="diff")

    return call.compute(compute, whole, name="diff")
