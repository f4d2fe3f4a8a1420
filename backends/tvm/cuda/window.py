"""Depthwise convolution, pooling and other sums of few terms: a thread for every result, which stays in a register."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.cuda.emit import GpuCode
from graphopt.backends.tvm.cuda.gpu import Gpu
from graphopt.backends.tvm.kernels.emit import index, unravelled
from graphopt.backends.tvm.kernels.fused import Fused, substituted

__all__ = ["window_kernel"]

_MOST_TERMS = 128
_RESULTS_PER_TERM = 256
"""With fewer results there are too few threads to hide the time that reading takes."""

_THREADS = 256
_UNKNOWN = 1024
"""What is taken for a size that is not known."""


def window_kernel(fused: Fused, gpu: Gpu) -> Any | None:
    """The kernel of a reduction over a window; None when blocks come before it, or it has few results of many terms."""
    block, result = fused.anchor, fused.result
    if fused.before or block.init is None or not isinstance(block.body, tirx.BufferStore):
        return None
    along = [axis for axis in block.iter_vars if axis.iter_type == tirx.IterVar.CommReduce]
    across = [axis for axis in block.iter_vars if axis.iter_type != tirx.IterVar.CommReduce]
    if not all(isinstance(axis.dom.extent, tirx.IntImm) for axis in along):
        return None
    terms = math.prod(int(axis.dom.extent) for axis in along)
    results = math.prod(int(size) if isinstance(size, tirx.IntImm) else _UNKNOWN for size in result.shape)
    if terms > _MOST_TERMS or results < _RESULTS_PER_TERM * terms or len(across) != len(result.shape):
        return None
    code = GpuCode()
    total = math.prod(result.shape, start=index(1))
    blocks = tirx.floordiv(total + (_THREADS - 1), index(_THREADS))
    with code.launched(block_x=blocks, thread_x=_THREADS) as at:
        number = code.let("number", index(at["block_x"]) * _THREADS + index(at["thread_x"]))
        with code.when(number < total):
            place = unravelled(code, number, list(result.shape))
            places = {axis.var: i for axis, i in zip(across, place, strict=True)}
            sums = code.local("sums", 1, str(result.dtype))
            code.store(sums, [index(0)], substituted(block.init.value, {}, places))
            with ExitStack() as loops:
                for axis in along:
                    places[axis.var] = loops.enter_context(code.loop("tap", int(axis.dom.extent)))
                update = substituted(block.body.value, {result: sums[index(0)]}, places)
                code.store(sums, [index(0)], update)
            fused.epilogue.emit(code, sums[index(0)], place)
    return fused.rewritten(code.done())
