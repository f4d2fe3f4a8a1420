"""Reductions that keep the last axis: pooling, means over an image, resizing. Vectors run along that axis.

A task computes some of the leading places. For each run of vectors along the last axis, the whole reduction goes over
accumulators in registers, in the order in which the specification has it.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.kernels.emit import Code, index, unravelled, vector
from graphopt.backends.tvm.kernels.fused import Fused, substituted
from graphopt.backends.tvm.kernels.machine import Machine

__all__ = ["reduction_kernel"]

_SERIAL_ELEMENTS = 4096
"""A result whose computation reads fewer elements is not worth a second thread."""


_SHORT = 128
"""Sums of fewer elements are formed one by one."""


def reduction_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of an anchor marked `reduction`; None when it is something else or the last axis is too short."""
    if fused.notes["kernel"] != "reduction" or str(fused.result.dtype) != "float32":
        return None
    width = fused.result.shape[-1]
    if not isinstance(width, tirx.IntImm) or int(width) < machine.lanes:
        return None
    block = fused.anchor
    spatial = [axis for axis in block.iter_vars if axis.iter_type == tirx.IterVar.DataPar]
    reduced = [axis for axis in block.iter_vars if axis.iter_type == tirx.IterVar.CommReduce]
    places = list(block.body.indices)
    if block.init is None or not all(p.same_as(a.var) for p, a in zip(places, spatial, strict=True)):
        return None
    code = Code()
    sizes = list(fused.result.shape)
    total = math.prod(sizes[:-1], start=index(1))
    work = _constant(sizes[:-1] + [axis.dom.extent for axis in reduced]) * int(width)
    kind = "serial" if 0 < work < _SERIAL_ELEMENTS else "parallel"
    lanes, vectors = machine.lanes, -(-int(width) // machine.lanes)
    together = max(size for size in (1, 2, 3, 4) if vectors % size == 0)
    tasks, extra = total, 1
    if _constant(sizes[:-1]) == 1 and vectors // together > 1:
        tasks, extra = index(vectors // together), vectors // together
    with code.loop("task", tasks, kind) as task:
        at = unravelled(code, index(0) if extra > 1 else task, sizes[:-1])
        with code.loop("run", 1 if extra > 1 else vectors // together) as run:
            first = task if extra > 1 else run
            starts = [
                code.let("start", tirx.min((first * together + q) * lanes, index(int(width) - lanes)))
                for q in range(together)
            ]
            _reduce(code, fused, [a.var for a in spatial], reduced, at, starts, lanes)
    return fused.rewritten(code.done())


def _reduce(
    code: Code, fused: Fused, axes: list[Any], reduced: list[Any], at: list[Any], starts: list[Any], lanes: int
) -> None:
    block, dtype = fused.anchor, str(fused.result.dtype)
    totals = [code.local(f"total_{q}", lanes, dtype) for q in range(len(starts))]
    lines = [code.local(f"line_{q}", lanes, dtype) for q in range(len(starts))] if _in_lines(block, reduced) else totals

    def begin(sums: list[Any]) -> None:
        for total, start in zip(sums, starts, strict=True):
            with code.loop("lane", lanes, "vectorized") as lane:
                places = dict(zip(axes, [*at, start + lane], strict=True))
                code.store(total, lane, substituted(block.init.value, {}, places))

    def step(sums: list[Any], places: dict[Any, Any]) -> None:
        for total, start in zip(sums, starts, strict=True):
            with code.loop("lane", lanes, "vectorized") as lane:
                here = places | dict(zip(axes, [*at, start + lane], strict=True))
                code.store(total, lane, substituted(block.body.value, {fused.result: total[lane]}, here))

    def nest(remaining: list[Any], places: dict[Any, Any]) -> None:
        if not remaining:
            step(lines, places)
            return
        axis, *inner = remaining
        apart = lines is not totals and not inner
        if apart:
            begin(lines)
        with code.loop("k", axis.dom.extent) as k:
            nest(inner, places | {axis.var: axis.dom.min + k})
        if apart:
            for total, line in zip(totals, lines, strict=True):
                code.store(total, vector(0, lanes), total[vector(0, lanes)] + line[vector(0, lanes)])

    begin(totals)
    nest(reduced, {})
    for total, start in zip(totals, starts, strict=True):
        with code.loop("lane", lanes, "vectorized") as lane:
            fused.epilogue.emit(code, total[lane], [*at, start + lane])


def _in_lines(block: Any, reduced: list[Any]) -> bool:
    """Whether to add up lines first and then their sums: rounding errors grow with the length of a sum."""
    elements = _constant([axis.dom.extent for axis in reduced])
    return isinstance(block.body.value, tirx.Add) and len(reduced) > 1 and not 0 < elements < _SHORT


def _constant(sizes: list[Any]) -> int:
    """The product of sizes; 0 when one of them is not a constant."""
    return math.prod(int(size) if isinstance(size, tirx.IntImm) else 0 for size in sizes)
