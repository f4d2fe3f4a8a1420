"""Activations: element-wise formulas of one input, computed in float32 for the 16-bit floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tvm import relax, tirx

from graphopt.backends.tvm.operators.elementwise import compute_dtype, per_element
from graphopt.backends.tvm.operators.extreme import at_least, at_most
from graphopt.backends.tvm.registry import Call, converts, element_wise

aten = torch.ops.aten
op = relax.op


def _polynomial(call: Call, self: Any, function: Callable[[Any, Callable[[float], Any]], Any]) -> Any:
    """An element-wise formula of one input; `function(x, const)` builds it from TIR scalars."""
    dtype = compute_dtype(call)
    return per_element(call, lambda x: function(x, lambda v: tirx.const(v, dtype)), call.operand(self, dtype))


@element_wise(aten.gelu.default)
def gelu(call: Call, self: Any, approximate: str = "none") -> Any:
    x = call.operand(self, compute_dtype(call))
    return op.nn.gelu_tanh(x) if approximate == "tanh" else op.nn.gelu(x)


@element_wise(aten.hardsigmoid.default)
def hardsigmoid(call: Call, self: Any) -> Any:
    return _polynomial(call, self, lambda x, k: _sixth(call, at_least(at_most(x + k(3), k(6)), k(0)), k))


@element_wise(aten.hardswish.default)
def hardswish(call: Call, self: Any) -> Any:
    return _polynomial(call, self, lambda x, k: x * _sixth(call, at_least(at_most(x + k(3), k(6)), k(0)), k))


def _sixth(call: Call, x: Any, k: Callable[[float], Any]) -> Any:
    """x / 6; a multiplication is several times faster, and errs by a unit in the last place at most."""
    return x / k(6) if call.machine.exact else x * k(1 / 6)


@element_wise(aten.leaky_relu.default)
def leaky_relu(call: Call, self: Any, negative_slope: float = 0.01) -> Any:
    return _polynomial(call, self, lambda x, k: tirx.Select(x > k(0), x, x * k(negative_slope)))


@element_wise(aten.elu.default)
def elu(call: Call, self: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    def formula(x: Any, k: Any) -> Any:
        return tirx.Select(x > k(0), x * k(scale), (tirx.exp(x * k(input_scale)) - k(1)) * k(alpha * scale))

    return _polynomial(call, self, formula)


@element_wise(aten.celu.default)
def celu(call: Call, self: Any, alpha: float = 1.0) -> Any:
    return elu(call, self, alpha, 1, 1 / alpha)


@element_wise(aten.softplus.default)
def softplus(call: Call, self: Any, beta: float = 1, threshold: float = 20) -> Any:
    def formula(x: Any, k: Any) -> Any:
        return tirx.Select(x * k(beta) > k(threshold), x, tirx.log1p(tirx.exp(x * k(beta))) / k(beta))

    return _polynomial(call, self, formula)


@element_wise(aten.mish.default)
def mish(call: Call, self: Any) -> Any:
    def formula(x: Any, k: Any) -> Any:
        return x * tirx.tanh(tirx.Select(x > k(20), x, tirx.log1p(tirx.exp(x))))

    return _polynomial(call, self, formula)


@element_wise(aten.log_sigmoid.default)
def log_sigmoid(call: Call, self: Any) -> Any:
    """min(x, 0) - log(1 + exp(-|x|)), which never overflows."""
    return _polynomial(call, self, lambda x, k: tirx.min(x, k(0)) - tirx.log1p(tirx.exp(k(0) - tirx.abs(x))))


@element_wise(aten.softshrink.default)
def softshrink(call: Call, self: Any, lambd: float = 0.5) -> Any:
    def formula(x: Any, k: Any) -> Any:
        low = tirx.Select(x < k(-lambd), x + k(lambd), k(0))
        return tirx.Select(x > k(lambd), x - k(lambd), low)

    return _polynomial(call, self, formula)


@element_wise(aten.threshold.default)
def threshold(call: Call, self: Any, threshold: float, value: float) -> Any:
    return _polynomial(call, self, lambda x, k: tirx.Select(x <= k(threshold), k(value), x))


@converts(aten.prelu.default, aten._prelu_kernel.default)
def prelu(call: Call, self: Any, weight: Any) -> Any:
    dtype = compute_dtype(call)
    x, slope = call.operand(self, dtype), call.operand(weight, dtype)
    rank = len(x.ty.shape)
    if len(slope.ty.shape) == 1 and rank > 1:
        slope = call.reshape(slope, [slope.ty.shape[0] if axis == 1 else 1 for axis in range(rank)])
    return op.where(call.emit(op.greater(x, relax.const(0, dtype))), x, call.emit(op.multiply(x, slope)))


@converts(aten.glu.default)
def glu(call: Call, self: Any, dim: int = -1) -> Any:
    left, right = call.emit(op.split(call.operand(self, compute_dtype(call)), 2, dim))
    return op.multiply(left, call.emit(op.sigmoid(right)))


@element_wise(aten.hardtanh.default)
def hardtanh(call: Call, self: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    return _polynomial(call, self, lambda x, k: at_most(at_least(x, k(min_val)), k(max_val)))


@element_wise(aten.relu.default)
def relu(call: Call, self: Any) -> Any:
    return _polynomial(call, self, lambda x, k: at_least(x, k(0)))


@element_wise(aten.relu6.default)
def relu6(call: Call, self: Any) -> Any:
    return hardtanh(call, self, 0, 6)


@element_wise(aten.rad2deg.default)
def rad2deg(call: Call, self: Any) -> Any:
    return _polynomial(call, self, lambda x, k: x * k(180 / math.pi))
