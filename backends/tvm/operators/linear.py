"""Matrix products. Sums run in float32 for the 16-bit floats, and in the dtype of the result otherwise."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from tvm import ir, relax

from graphopt.backends.tvm.kernels.matmul import matmul as fused_matmul
from graphopt.backends.tvm.layout import ordered, plain
from graphopt.backends.tvm.operators.packed import packed_linear, packs
from graphopt.backends.tvm.registry import Call, converts, precomputed, shape_of, wide

aten = torch.ops.aten
op = relax.op


@converts(aten.linear.default)
def linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Any:
    """input [..., in], weight [out, in], bias [out] -> [..., out].

    The weight is turned to [in, out] while compiling, so that the sums run along vectors of outputs. The leading axes
    are merged: the batch and the sequence make one long axis to divide among threads.
    """
    dtype = wide(call.dtype)
    if packs(call, weight, input):
        result = packed_linear(call, input, weight)
        return result if bias is None else op.add(result, call.cast(bias, dtype))
    *rows, width = shape_of(input)
    height = functools.reduce(operator.mul, rows, 1)
    turned = _turned(call, call.cast(weight, dtype))
    result = call.emit(op.matmul(call.reshape(call.cast(input, dtype), [height, width]), turned))
    if bias is not None:
        result = call.emit(op.add(result, call.cast(bias, dtype)))
    return call.reshape(result, call.shape)


@converts(aten.matmul.default, aten.mm.default, aten.bmm.default, layout="any")
def matmul(call: Call, self: Any, other: Any = None, mat2: Any = None) -> Any:
    return _product(call, self, other if mat2 is None else mat2)


def _product(call: Call, left: Any, right: Any) -> Any:
    """left [..., M, K] times right [..., K, N]. Constant right operands are packed, turned ones read as they lie."""
    dtype = wide(call.dtype)
    if isinstance(right, ir.GenericConst) and len(shape_of(right)) == 2 and len(ordered(left).shape) >= 2:
        turned = _turned(call, call.cast(right, dtype))
        source = plain(call, left)
        if packs(call, turned, source):
            return packed_linear(call, source, turned)
    a, b = ordered(left), ordered(right)
    both = len(a.shape) >= 2 and len(b.shape) >= 2 and a.dtype == b.dtype == dtype == "float32"
    if both and 0 not in (*a.shape, *b.shape):
        lead = call.sizes(call.meta)[:-2] if isinstance(call.meta, torch.Tensor) else []
        return call.compute(
            lambda x, y: fused_matmul(x, a.order, y, b.order, lead), a.value, b.value, name="matmul", anchor=True
        )
    return op.matmul(call.cast(plain(call, left), dtype), call.cast(plain(call, right), dtype))


@converts(aten.mv.default)
def mv(call: Call, self: Any, vec: Any) -> Any:
    return _product(call, self, vec)


@converts(aten.dot.default)
def dot(call: Call, self: Any, tensor: Any) -> Any:
    return _product(call, self, tensor)


def _turned(call: Call, matrix: Any) -> Any:
    """The transposed matrix; a constant is transposed now."""
    if not isinstance(matrix, ir.GenericConst):
        return call.emit(op.permute_dims(matrix, [1, 0]))
    return precomputed(matrix, torch.t)


def _plus_product(call: Call, addend: Any, left: Any, right: Any, beta: Any, alpha: Any) -> Any:
    dtype = wide(call.dtype)
    product = call.emit(_product(call, left, right))
    if alpha != 1:
        product = call.emit(op.multiply(product, relax.const(alpha, dtype)))
    if beta == 0:
        return product
    addend = call.cast(addend, dtype)
    if beta != 1:
        addend = call.emit(op.multiply(addend, relax.const(beta, dtype)))
    return op.add(product, addend)


@converts(aten.addmm.default)
def addmm(call: Call, self: Any, mat1: Any, mat2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return _plus_product(call, self, mat1, mat2, beta, alpha)


@converts(aten.baddbmm.default)
def baddbmm(call: Call, self: Any, batch1: Any, batch2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return _plus_product(call, self, batch1, batch2, beta, alpha)
