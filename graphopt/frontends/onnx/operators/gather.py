"""Reading and writing at indices. A negative index counts from the end."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.unsigned import same_bits
from graphopt.frontends.onnx.values import Operand, refuse

_REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def gather(data: Tensor, indices: Operand, *, axis: int = 0) -> Tensor:
    """Indexing as in numpy; one known index selects, which keeps the graph plain."""
    if not isinstance(indices, Tensor):
        return data.select(axis, int(indices))
    if indices.ndim == 0:
        return gather(data, indices.reshape(1), axis=axis).squeeze(axis)
    return same_bits(lambda x: x[(slice(None),) * (axis % data.ndim) + (indices.to(torch.int64),)], data)


@operator("GatherElements", since=11)
def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return same_bits(lambda x: x.gather(axis, _wrapped(indices, x.shape[axis])), data)


def _grid(indices: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    """The last axis of `indices` as one index tensor per axis, after those of the batch axes."""
    shape = indices.shape[:-1]
    batch = [
        torch.arange(shape[i]).reshape([-1 if j == i else 1 for j in range(len(shape))]).expand(shape)
        for i in range(batch_dims)
    ]
    return (*batch, *indices.to(torch.int64).unbind(-1))


@operator("GatherND", since=11, until=11)
def gather_nd_plain(data: Tensor, indices: Tensor) -> Tensor:
    return gather_nd(data, indices)


@operator("GatherND", since=12)
def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    return same_bits(lambda x: x[_grid(indices, batch_dims)], data)


@operator("Scatter", since=9, until=10)
def scatter(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    return scatter_elements(data, indices, updates, axis=axis)


@operator("ScatterElements", since=11)
def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    index = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return same_bits(lambda x, y: x.scatter(axis, index, y), data, updates)
    if reduction not in _REDUCTIONS:
        raise refuse(f"attribute 'reduction'='{reduction}' is not handled")
    return data.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction], include_self=True)


@operator("ScatterND", since=11)
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction in ("none", "add"):
        return data.index_put(_grid(indices, 0), updates, accumulate=reduction == "add")
    if reduction not in _REDUCTIONS:
        raise refuse(f"attribute 'reduction'='{reduction}' is not handled")
    depth = indices.shape[-1]
    rows = data.reshape([-1, *data.shape[depth:]])
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis, part in enumerate(indices.unbind(-1)):
        flat = flat * data.shape[axis] + _wrapped(part, data.shape[axis])
    flat, values = flat.reshape(-1), updates.reshape([-1, *data.shape[depth:]])
    index = flat.reshape([-1] + [1] * (rows.ndim - 1)).expand(values.shape)
    return rows.scatter_reduce(0, index, values, _REDUCTIONS[reduction], include_self=True).reshape(data.shape)


@operator("TensorScatter", since=24)
def tensor_scatter(
    cache: Tensor, update: Tensor, starts: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Write `update` into `cache` along `axis`, per sample from its own start."""
    if mode not in ("linear", "circular"):
        raise refuse(f"attribute 'mode'='{mode}' is not handled")
    axis %= cache.ndim
    steps = torch.arange(update.shape[axis])
    places = steps if starts is None else starts.to(torch.int64).unsqueeze(1) + steps
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = (1 if starts is None else update.shape[0]), update.shape[axis]
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)


@operator("OneHot", since=9)
def one_hot(indices: Tensor, depth: int, values: Tensor, *, axis: int = -1) -> Tensor:
    """`values` is [off, on]; an index outside -depth..depth-1 switches nothing on."""
    axis %= indices.ndim + 1
    classes = torch.arange(int(depth)).reshape([-1] + [1] * (indices.ndim - axis))
    hot = _wrapped(indices, int(depth)).unsqueeze(axis) == classes
    return torch.where(hot, values[1], values[0])
