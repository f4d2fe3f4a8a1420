"""Operators that make tensors from nothing but sizes and numbers."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.registry import Call, Refused, converts

aten = torch.ops.aten
op = relax.op


@converts(aten.arange.default)
def arange(call: Call, end: Any, **placement: Any) -> Any:
    return arange_step(call, 0, end, 1)


@converts(aten.arange.start)
def arange_start(call: Call, start: Any, end: Any, **placement: Any) -> Any:
    return arange_step(call, start, end, 1)


@converts(aten.arange.start_step)
def arange_step(call: Call, start: Any, end: Any, step: Any = 1, **placement: Any) -> Any:
    """start + i step, for as many i as torch inferred; integers are computed in int64, floats in float64."""
    dtype, shape = call.dtype, call.shape
    exact = "float64" if "float" in dtype else "int64"

    def number(value: Any) -> Any:
        return tirx.const(value, exact) if isinstance(value, int | float) else tirx.Cast(exact, value)

    def compute() -> te.Tensor:
        def element(i: Any) -> Any:
            return tirx.Cast(dtype, number(start) + tirx.Cast(exact, i) * number(step))

        return te.compute(shape, element, name="arange")

    return call.compute(compute, name="arange")


def _filled(call: Call, value: Any) -> Any:
    dtype = call.dtype
    if isinstance(value, bool | int | float):
        return op.full(call.shape, relax.const(value, dtype), dtype)
    if isinstance(value.ty, relax.TensorType):
        return op.broadcast_to(call.cast(value, dtype), call.shape)
    shape = call.shape
    return call.compute(lambda: te.compute(shape, lambda *i: tirx.Cast(dtype, value), name="full"), name="full")


@converts(aten.full.default, aten.new_full.default, aten.full_like.default)
def full(call: Call, fill_value: Any, **placement: Any) -> Any:
    return _filled(call, fill_value)


@converts(aten.fill.Scalar, aten.fill.Tensor)
def fill(call: Call, self: Any, value: Any) -> Any:
    return _filled(call, value)


@converts(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(call: Call, **placement: Any) -> Any:
    return _filled(call, 0)


@converts(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(call: Call, **placement: Any) -> Any:
    return _filled(call, 1)


@converts(aten.scalar_tensor.default)
def scalar_tensor(call: Call, s: Any, **placement: Any) -> Any:
    return _filled(call, s)


@converts(aten.eye.default, aten.eye.m)
def eye(call: Call, **placement: Any) -> Any:
    dtype, shape = call.dtype, call.shape
    return call.compute(lambda: te.compute(shape, lambda i, j: tirx.Cast(dtype, i == j), name="eye"), name="eye")


@converts(aten.linspace.default)
def linspace(call: Call, start: Any, end: Any, steps: int, **placement: Any) -> Any:
    if "float" not in call.dtype:
        raise Refused("linspace of integers")
    numbers = torch.linspace(start, end, steps, dtype=call.meta.dtype)
    return relax.const(numbers.double().numpy().astype(call.dtype), call.dtype)
