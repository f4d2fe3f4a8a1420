"""Concatenation, with the element-wise work that follows it: each input is copied in runs along the last axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import ir, te, tirx

from graphopt.backends.tvm.kernels.emit import Code, index, unravelled
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine

__all__ = ["concatenation", "concatenation_kernel"]


def concatenation(tensors: Sequence[te.Tensor], axis: int) -> te.Tensor:
    """Tensors of equal sizes but along `axis`, one after the other, as a specification."""
    starts = [sum((t.shape[axis] for t in tensors[:i]), start=index(0)) for i in range(len(tensors) + 1)]
    shape = [starts[-1] if a == axis else size for a, size in enumerate(tensors[0].shape)]

    def element(*at: Any) -> Any:
        result = tensors[-1](*at[:axis], at[axis] - starts[-2], *at[axis + 1 :])
        for t, start, end in reversed(list(zip(tensors[:-1], starts, starts[1:], strict=False))):
            inside = t(*at[:axis], at[axis] - start, *at[axis + 1 :])
            result = tirx.if_then_else(at[axis] < end, inside, result)
        return result

    notes = {ANCHOR: "concatenation", "graphopt.axis": axis}
    return te.compute(shape, element, name="concatenation", attrs=notes)


def concatenation_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `concatenation`; None when it is something else or a size of an input is not a constant."""
    if fused.notes["kernel"] != "concatenation":
        return None
    axis = int(fused.notes["axis"])
    sources = _in_order(fused)
    sizes = [list(buffer.shape) for buffer in sources]
    if any(not isinstance(size, tirx.IntImm) for shape in sizes for size in shape[1:] or shape):
        return None
    if axis == 0 or len({str(buffer.dtype) for buffer in sources}) > 1:
        return None
    code = Code()
    outer = math.prod(sizes[0][:axis], start=index(1))
    with code.loop("task", outer, "parallel") as task:
        place = unravelled(code, task, sizes[0][:axis])
        start = 0
        for buffer, shape in zip(sources, sizes, strict=True):
            extents = [int(size) for size in shape[axis:]]
            _copy(code, fused, buffer, place, extents, start, machine.lanes)
            start += extents[0]
    return fused.rewritten(code.done())


def _in_order(fused: Fused) -> list[Any]:
    """The inputs in the order of the specification, in whose nested choices the first stands first."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(fused.anchor.body.value, (ir.TensorLoad, loads.append))
    return [load.source for load in loads]


def _copy(code: Code, fused: Fused, buffer: Any, place: list[Any], extents: list[int], start: int, lanes: int) -> None:
    *middle, width = extents
    total = math.prod(middle)

    def element(at: list[Any], lane: Any) -> None:
        inner = [*at, lane]
        value = buffer[(*place, *inner)]
        fused.epilogue.emit(code, value, [*place, inner[0] + start, *inner[1:]])

    with code.loop("line", total) as line:
        at = unravelled(code, line, [index(size) for size in middle])
        if width < lanes:
            for lane in range(width):
                element(at, index(lane))
            return
        with code.loop("vector", -(-width // lanes)) as number:
            first = number * lanes
            if width % lanes:
                first = code.let("first", tirx.min(first, index(width - lanes)))
            with code.loop("lane", lanes, "vectorized") as lane:
                element(at, first + lane)
