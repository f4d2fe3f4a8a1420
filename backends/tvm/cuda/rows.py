"""Layer norm and RMS norm: a warp for every row, which stays in its registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.cuda.emit import GpuCode
from graphopt.backends.tvm.cuda.gpu import Gpu
from graphopt.backends.tvm.kernels.emit import index, unravelled
from graphopt.backends.tvm.kernels.fused import Fused

__all__ = ["rows_kernel"]

_WARP, _WARPS = 32, 4
_WIDEST = 32 * _WARP
"""More than 32 numbers in a thread would not stay in registers."""

Expr = Any


def rows_kernel(fused: Fused, gpu: Gpu) -> Any | None:
    """The kernel of `standardized`; None when it is something else, or a row is too long or of unknown length."""
    if fused.notes["kernel"] != "standardized" or len(fused.reads) != 1:
        return None
    (source,) = fused.reads
    *lead, width = source.shape
    if not isinstance(width, tirx.IntImm) or int(width) > _WIDEST or str(fused.result.dtype) != "float32":
        return None
    code = GpuCode()
    rows = math.prod(lead, start=index(1))
    blocks = tirx.floordiv(rows + (_WARPS - 1), index(_WARPS))
    with code.launched(block_x=blocks, thread_x=_WARPS * _WARP) as at:
        number = index(at["block_x"]) * _WARPS + tirx.floordiv(index(at["thread_x"]), index(_WARP))
        row = code.let("row", number)
        lane = code.let("lane", tirx.floormod(index(at["thread_x"]), index(_WARP)))
        with code.when(row < rows):
            _standardize(code, fused, source, int(width), unravelled(code, row, list(lead)), lane)
    return fused.rewritten(code.done())


def _standardize(code: GpuCode, fused: Fused, source: Any, width: int, row: list[Expr], lane: Expr) -> None:
    """As the specification: the mean first, then the squares of what is left, so that a large mean costs no digits."""
    turns = -(-width // _WARP)
    kept = code.local("kept", turns)
    count, zero = tirx.const(width, "float32"), tirx.const(0, "float32")

    def each(body: Callable[[Expr, Expr], None]) -> None:
        with code.loop("turn", turns) as turn:
            place = turn * _WARP + lane
            if width % _WARP == 0:
                body(turn, place)
                return
            with code.when(place < width):
                body(turn, place)

    def total(name: str, term: Callable[[Expr], Expr]) -> Expr:
        sums = code.local(name, 1)
        code.store(sums, [index(0)], zero)
        each(lambda turn, place: code.store(sums, [index(0)], sums[index(0)] + term(turn)))
        return code.let(name, code.value("graphopt::over_warp", sums[index(0)], headers=("rows.cuh",)))

    each(lambda turn, place: code.store(kept, [turn], tirx.Cast("float32", source[(*row, place)])))
    if int(fused.notes["centred"]):
        mean = code.let("mean", total("total", lambda turn: kept[turn]) / count)
        each(lambda turn, place: code.store(kept, [turn], kept[turn] - mean))
    power = total("power", lambda turn: kept[turn] * kept[turn])
    eps = tirx.const(float(str(fused.notes["eps"])), "float32")
    scale = code.let("scale", tirx.const(1, "float32") / tirx.sqrt(power / count + eps))
    each(lambda turn, place: fused.epilogue.emit(code, kept[turn] * scale, [*row, place]))
