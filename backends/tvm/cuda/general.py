"""The general schedule for GPUs: TVM's own rules, each function by the first that fits it."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, s_tir, tirx

__all__ = ["schedule"]

_WINDOW = 128
"""Sums of fewer terms are left to one thread each, where there are many: pooling, depthwise convolution."""


def schedule(module: IRModule) -> IRModule:
    """Bind the loops of every function that is not scheduled to blocks and threads. Needs a current target."""
    from tvm.s_tir import dlight

    plain = [place for place, function in module.functions.items() if _wants_one_thread(function)]
    functions = {place: module[place] for place in plain}
    done = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(IRModule(functions, module.attrs))
    rest = {place: function for place, function in module.functions.items() if place not in functions}
    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    others = dlight.ApplyDefaultSchedule(*rules)(IRModule(rest, module.attrs))
    return IRModule({**others.functions, **done.functions}, module.attrs)


def _wants_one_thread(function: Any) -> bool:
    """Whether a function reduces by a rule that threads cannot share, or only over small windows."""
    if not isinstance(function, tirx.PrimFunc) or function.attrs.get("tirx.is_scheduled", False):
        return False
    reductions: list[Any] = []

    def note(block: Any) -> None:
        if block.init is not None:
            reductions.append(block)

    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, note))
    if any(not _is_shared(block) for block in reductions):
        return True
    return bool(reductions) and all(_is_window(block) for block in reductions)


def _is_shared(block: Any) -> bool:
    """Whether threads can divide a reduction among them: sums, products, largest and smallest."""
    known = (tirx.Add, tirx.Mul, tirx.Max, tirx.Min)
    return isinstance(block.body, tirx.BufferStore) and isinstance(block.body.value, known)


def _is_window(block: Any) -> bool:
    """Whether there are many results of few terms each."""
    results = terms = 1
    for axis in block.iter_vars:
        extent = axis.dom.extent
        size = int(extent) if isinstance(extent, tirx.IntImm) else 1024
        if axis.iter_type == tirx.IterVar.CommReduce:
            terms *= size
        else:
            results *= size
    return terms <= _WINDOW and results >= 256 * terms
