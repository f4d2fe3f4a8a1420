"""Attention and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import tvm_ffi
from tvm import relax, te, tirx

from graphopt.backends.tvm.kernels.attention import Operand
from graphopt.backends.tvm.kernels.attention import attention as fused_attention
from graphopt.backends.tvm.kernels.normalization import softmax as row_softmax
from graphopt.backends.tvm.kernels.strided import Strided
from graphopt.backends.tvm.layout import Ordered, ordered, plain, settled
from graphopt.backends.tvm.operators.extreme import largest_over, lowest
from graphopt.backends.tvm.registry import Call, Refused, converts, dtype_of, normal_axis, shape_of, wide
from graphopt.backends.tvm.strided import strided

aten = torch.ops.aten
op = relax.op


@converts(aten._safe_softmax.default)
def safe_softmax(call: Call, self: Any, dim: int, dtype: Any = None) -> Any:
    """Zero where every element of a row is -inf."""
    if not shape_of(self):
        return op.ones_like(call.cast(self, wide(call.dtype)))
    return _zero_where_all_masked(call, call.emit(op.nn.softmax(call.cast(self, wide(call.dtype)), dim)), self, dim)


@converts(aten.softmax.int, aten._softmax.default, layout="any")
def softmax(call: Call, self: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    rows = _rows_kernel(call, self, dim, log=False)
    if rows is not None:
        return rows
    x = call.cast(plain(call, self), wide(call.dtype))
    return op.nn.softmax(x, dim) if shape_of(x) else op.ones_like(x)


def _rows_kernel(call: Call, x: Any, dim: int, *, log: bool) -> Any | None:
    """Softmax along the axis that is the last one in memory; None where it is another, or not in float32."""
    known = ordered(x)
    if not known.order or known.place(dim) != len(known.order) - 1 or wide(call.dtype) != "float32":
        return None
    if 0 in known.shape:
        return None
    value = call.cast(known.value, "float32")
    return Ordered(call.compute(lambda t: row_softmax(t, log=log), value, name="softmax", anchor=True), known.order)


@converts(aten.log_softmax.int, aten._log_softmax.default, layout="any")
def log_softmax(call: Call, self: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    """x - max - log(sum(exp(x - max)))."""
    rows = _rows_kernel(call, self, dim, log=True)
    if rows is not None:
        return rows
    x = call.cast(plain(call, self), wide(call.dtype))
    shifted = call.emit(op.subtract(x, largest_over(call, x, [normal_axis(dim, len(shape_of(x)))])))
    total = call.emit(op.sum(call.emit(op.exp(shifted)), dim, keepdims=True))
    return op.subtract(shifted, call.emit(op.log(total)))


@converts(aten.scaled_dot_product_attention.default, layout="any")
def attention(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query key^T scale + mask) value; query [..., L, E], key [..., S, E], value [..., S, V].

    A query whose keys are all masked gets zeros, as torch gives. The causal mask is aligned to the upper left.
    """
    if dropout_p:
        raise Refused("attention with dropout is random; call model.eval() first")
    width = ordered(query).shape[-1]
    if scale is None:
        if not isinstance(width, int):
            raise Refused("attention over heads of dynamic width")
        scale = 1 / math.sqrt(width)
    if _has_kernel(call, query, key, value, enable_gqa):
        return _with_kernel(call, query, key, value, attn_mask, scale, is_causal)
    tensors = [plain(call, x) for x in (query, key, value)]
    mask = plain(call, attn_mask)
    return _in_steps(call, tensors, mask, scale, is_causal, enable_gqa)


def _has_kernel(call: Call, query: Any, key: Any, value: Any, grouped: bool) -> bool:
    """Whether the leading axes agree (but for the heads of grouped queries) and everything is in float32."""
    if not call.machine.lanes:  # a GPU
        return False
    (*q, length, width), (*k, keys, _), (*v, _, depth) = (ordered(x).shape for x in (query, key, value))
    if any(ordered(x).dtype != "float32" for x in (query, key, value)) or call.dtype != "float32":
        return False
    if not (isinstance(width, int) and isinstance(depth, int) and width) or 0 in (length, keys, *q):
        return False
    if grouped and q:
        if not (isinstance(q[-1], int) and isinstance(k[-1], int) and k[-1] == v[-1]):
            return False
        q, k, v = q[:-1], k[:-1], v[:-1]
    return len(q) == len(k) == len(v) and all(
        same_size(a, b) for other in (k, v) for a, b in zip(q, other, strict=True)
    )


def same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(tvm_ffi.structural_equal(a, b))


def _with_kernel(call: Call, query: Any, key: Any, value: Any, mask: Any, scale: float, causal: bool) -> Any:
    rank = len(call.meta.shape)
    order = (*range(rank - 3), rank - 2, rank - 3, rank - 1) if rank > 2 else tuple(range(rank))
    known = [ordered(x) for x in (query, key, value)]
    if known[2].order[-1] != rank - 1:
        known[2] = ordered(plain(call, value))
    places = [_part(call, x) for x in known]
    if mask is not None:
        known.append(ordered(mask))
        places.append(None)

    values = [x.value if place is None else place.value for x, place in zip(known, places, strict=True)]
    apart = list(dict.fromkeys(values))  # parts of one tensor are read of one

    def compute(*tensors: te.Tensor) -> te.Tensor:
        given = [tensors[apart.index(value)] for value in values]
        q, k, v, *masks = (Operand(t, x.order, p) for t, x, p in zip(given, known, places, strict=True))
        return fused_attention(
            q, k, v, masks[0] if masks else None, scale, causal=causal, order="".join(map(str, order))
        )

    return settled(Ordered(call.compute(compute, *apart, name="attention", anchor=True), order))


def _part(call: Call, tensor: Ordered) -> Strided | None:
    """Where a tensor lies in another one of which it is a part, row by row; None where it is none."""
    place = strided(call, tensor)
    if place is None or place.value.same_as(tensor.value) or dtype_of(place.value) != "float32":
        return None
    static = all(isinstance(size, int) for size in place.sizes)
    return place if static and place.strides[-1] == 1 else None


def _in_steps(
    call: Call, tensors: Sequence[Any], attn_mask: Any, scale: float, is_causal: bool, enable_gqa: bool
) -> Any:
    dtype = wide(call.dtype)
    q, k, v = (call.cast(x, dtype) for x in tensors)
    if enable_gqa:
        k, v = (_repeat_heads(call, x, shape_of(q)[-3]) for x in (k, v))
    rank = len(shape_of(k))
    turned = call.emit(op.permute_dims(k, [*range(rank - 2), rank - 1, rank - 2]))
    scores = call.emit(op.matmul(call.emit(op.multiply(q, relax.const(scale, dtype))), turned))
    if is_causal:
        scores = _causal(call, scores)
    if attn_mask is None:
        return op.matmul(call.emit(op.nn.softmax(scores, -1)), v)
    scores = _masked(call, scores, attn_mask)
    weights = _zero_where_all_masked(call, call.emit(op.nn.softmax(scores, -1)), scores, -1)
    return op.matmul(weights, v)


def _repeat_heads(call: Call, x: Any, heads: Any) -> Any:
    """[..., groups, S, E] -> [..., heads, S, E], each group serving heads / groups consecutive heads."""
    *rest, groups, length, width = shape_of(x)
    if not (isinstance(heads, int) and isinstance(groups, int)):
        raise Refused("grouped-query attention with a dynamic number of heads")
    if heads == groups:
        return x
    times = heads // groups
    wide_x = call.reshape(x, [*rest, groups, 1, length, width])
    copies = call.emit(op.broadcast_to(wide_x, [*rest, groups, times, length, width]))
    return call.reshape(copies, [*rest, heads, length, width])


def _causal(call: Call, scores: Any) -> Any:
    hidden = lowest(dtype_of(scores))

    def mask(s: te.Tensor) -> te.Tensor:
        return te.compute(s.shape, lambda *i: tirx.Select(i[-1] <= i[-2], s(*i), hidden), name="causal")

    return call.compute(mask, scores, name="causal")


def _masked(call: Call, scores: Any, mask: Any) -> Any:
    dtype = dtype_of(scores)
    if dtype_of(mask) != "bool":
        return call.emit(op.add(scores, call.cast(mask, dtype)))
    return call.emit(op.where(mask, scores, relax.const(-math.inf, dtype)))


def _zero_where_all_masked(call: Call, weights: Any, scores: Any, dim: int) -> Any:
    dtype = dtype_of(weights)
    axis = normal_axis(dim, len(shape_of(scores)))
    largest = largest_over(call, call.cast(scores, dtype), [axis])
    masked = call.emit(op.equal(largest, relax.const(-math.inf, dtype)))
    return call.emit(op.where(masked, relax.const(0, dtype), weights))
