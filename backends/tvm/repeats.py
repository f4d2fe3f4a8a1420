"""What the fusion of operators has to know of operands that are repeated along an axis."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, ir, relax, tirx

__all__ = ["keep_repeats_apart"]

_INJECTIVE = 2
"""TVM's number for functions that are not fused into the product before them."""


def keep_repeats_apart(module: IRModule) -> IRModule:
    """Mark element-wise functions of which a computed operand is smaller than the result.

    A kernel that computes the operand could not go on to the result, which has more elements: a gate [N, 1, 1, C] made
    by a linear layer, times an image [N, H, W, C]. Constants (a bias, a scale) never stand before a kernel.
    """
    marked: dict[Any, Any] = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, ir.Call) or not call.op.same_as(ir.Op.get("relax.call_tir")):
                continue
            name, operands = call.args[0], call.args[1]
            function = module[name]
            computed = [operand for operand in operands.fields if isinstance(operand, relax.Var)]
            if int(function.attrs.get("op_pattern", _INJECTIVE)) < _INJECTIVE and any(
                _is_repeated(operand.ty, call.ty) for operand in computed
            ):
                marked[name] = function.with_attr("op_pattern", _INJECTIVE)
    return IRModule({**module.functions, **marked}, module.attrs)


def _is_repeated(operand: Any, result: Any) -> bool:
    if not isinstance(operand, relax.TensorType) or len(operand.shape) != len(result.shape):
        return False
    return any(
        isinstance(own, tirx.IntImm) and int(own) == 1 and not tvm_ffi.structural_equal(own, size)
        for own, size in zip(operand.shape, result.shape, strict=True)
    )
