"""Attention and softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.operators.extreme import largest_over, lowest
from graphopt.backends.tvm.registry import Call, Refused, converts, dtype_of, normal_axis, shape_of, wide

aten = torch.ops.aten
op = relax.op


@converts(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(call: Call, self: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    if not shape_of(self):
        return op.ones_like(call.cast(self, wide(call.dtype)))
    result = call.emit(op.nn.softmax(call.cast(self, wide(call.dtype)), dim))
    return _zero_where_all_masked(call, result, self, dim) if "safe" in str(call.node.target) else result


@converts(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(call: Call, self: Any, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    """x - max - log(sum(exp(x - max)))."""
    x = call.cast(self, wide(call.dtype))
    shifted = call.emit(op.subtract(x, largest_over(call, x, [normal_axis(dim, len(shape_of(x)))])))
    total = call.emit(op.sum(call.emit(op.exp(shifted)), dim, keepdims=True))
    return op.subtract(shifted, call.emit(op.log(total)))


@converts(aten.scaled_dot_product_attention.default)
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
    dtype = wide(call.dtype)
    q, k, v = (call.cast(x, dtype) for x in (query, key, value))
    if enable_gqa:
        k, v = (_repeat_heads(call, x, shape_of(q)[-3]) for x in (k, v))
    width = shape_of(q)[-1]
    if scale is None:
        if not isinstance(width, int):
            raise Refused("attention over heads of dynamic width")
        scale = 1 / math.sqrt(width)
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
