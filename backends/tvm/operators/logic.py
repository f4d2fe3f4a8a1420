"""Comparisons, and logic on booleans and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import relax, tirx

from graphopt.backends.tvm.operators import extreme
from graphopt.backends.tvm.operators.elementwise import broadcast, operands, per_element, truth
from graphopt.backends.tvm.registry import Call, dtype_name, element_wise, wide

aten = torch.ops.aten
op = relax.op


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Compare in the promoted dtype of both operands. A number that meets 16-bit floats is rounded to them first."""

    def convert(call: Call, self: Any, other: Any) -> Any:
        promoted = torch.result_type(*(_known(call.meta_of(position)) for position in (0, 1)))
        name = dtype_name(promoted)
        dtype = "int32" if name == "bool" else wide(name)
        pair = operands(call, _rounded(self, promoted), _rounded(other, promoted), dtype)
        return per_element(call, function, *broadcast(call, *pair))

    return convert


def _known(value: Any) -> Any:
    """A value of the same kind for torch's promotion rules, in which a symbolic size is a Python integer."""
    return 1 if isinstance(value, torch.SymInt) else value


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, bool | int | float) and dtype in (torch.float16, torch.bfloat16):
        return torch.tensor(value, dtype=dtype).item()
    return value


for _name, _function in {
    "eq": lambda x, y: extreme.if_numbers(x == y, x, y),
    "ne": extreme.differs,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: extreme.if_numbers(x <= y, x, y),
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: extreme.if_numbers(x >= y, x, y),
}.items():
    _packet = getattr(aten, _name)
    element_wise(_packet.Tensor, _packet.Scalar)(_comparison(_function))


def _logical(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda call, self, other: function(truth(call, self), truth(call, other))


element_wise(aten.logical_and.default)(_logical(op.logical_and))
element_wise(aten.logical_or.default)(_logical(op.logical_or))
element_wise(aten.logical_xor.default)(_logical(op.logical_xor))


def _opposite(call: Call, value: Any) -> Any:
    """The negation of booleans. (TVM turns `not (x < y)` into `y <= x`, which differ for NaN.)"""
    return per_element(call, lambda b: tirx.Cast("int8", b) ^ tirx.const(1, "int8"), value)


@element_wise(aten.logical_not.default)
def logical_not(call: Call, self: Any) -> Any:
    return _opposite(call, truth(call, self))


@element_wise(aten.bitwise_not.default)
def bitwise_not(call: Call, self: Any) -> Any:
    return _opposite(call, self) if call.dtype == "bool" else op.bitwise_not(self)


def _bitwise(on_bools: Callable[[Any, Any], Any], on_integers: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, other: Any) -> Any:
        function = on_bools if call.dtype == "bool" else on_integers
        return function(*operands(call, self, other, call.dtype))

    return convert


for _name, _functions in {
    "and": (op.logical_and, op.bitwise_and),
    "or": (op.logical_or, op.bitwise_or),
    "xor": (op.logical_xor, op.bitwise_xor),
}.items():
    _plain, _dunder = getattr(aten, f"bitwise_{_name}"), getattr(aten, f"__{_name}__")
    element_wise(_plain.Tensor, _plain.Scalar, _dunder.Tensor, _dunder.Scalar)(_bitwise(*_functions))
