"""Attention on tensor cores: the launch and the epilogue around attention.cuh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.cuda.emit import GpuCode
from graphopt.backends.tvm.cuda.gpu import Gpu
from graphopt.backends.tvm.kernels.emit import flat, index, unravelled
from graphopt.backends.tvm.kernels.fused import Fused

__all__ = ["attention_fits", "attention_kernel"]

_TYPES = {"float16": "half", "bfloat16": "nv_bfloat16"}
_SKEW, _TILE_KEYS = 8, 64
_WIDEST = 128
_FEW_BLOCKS = 264
"""Two for each multiprocessor: below that, warps share queries so that there are more blocks."""

Expr = Any


def attention_fits(width: Any, depth: Any, keys: Any, dtype: str) -> bool:
    """Whether there is a kernel for heads of this width, values of this depth and this number of keys."""
    sizes = all(isinstance(size, int) and 0 < size <= _WIDEST and size % 16 == 0 for size in (width, depth))
    return sizes and dtype in _TYPES and isinstance(keys, int)


def attention_kernel(fused: Fused, gpu: Gpu) -> Any | None:
    """The kernel of `attention`; None when it is something else."""
    if fused.notes["kernel"] != "gpu.attention":
        return None
    code = GpuCode()
    _Attention.of(fused).emit(code)
    return fused.rewritten(code.done())


@dataclass(frozen=True)
class _Operand:
    """A buffer, where in it a tensor begins, and its strides along the axes of the result (leading ones first)."""

    buffer: Any
    offset: int
    strides: tuple[int, ...]

    def start(self, code: GpuCode, heads: Sequence[Expr]) -> Expr:
        """The address of the matrix of some head; a mask may have fewer leading axes."""
        place = index(self.offset)
        own = self.strides[:-2]
        for head, stride in zip(list(heads)[len(heads) - len(own) :], own, strict=True):
            place = place + index(head) * stride if stride else place
        return tirx.address_of(flat(code, self.buffer)[place])


@dataclass(frozen=True)
class _Attention:
    """What the kernel needs to know: operands, sizes, the order of the result, and how warps share the work."""

    fused: Fused
    operands: tuple[_Operand, ...]
    lead: tuple[Any, ...]
    length: Any
    width: int
    keys: int
    depth: int
    row_warps: int
    key_warps: int

    @classmethod
    def of(cls, fused: Fused) -> _Attention:
        notes, before = fused.notes, {block.name_hint: block for block in fused.before}
        rows = [[int(n) for n in row.split(",")] for row in str(notes["strides"]).split(";")]
        products, weights = before["products"].writes[0].source, fused.before[-1].writes[0].source
        query, key = _two(before["products"])
        (value,) = (r.source for r in fused.anchor.reads if not r.source.same_as(weights))
        masks = [r.source for r in before["scores"].reads if not r.source.same_as(products)]
        operands = [_Operand(b, r[0], tuple(r[1:])) for b, r in zip((query, key, value, *masks), rows, strict=True)]
        order = _order(fused)
        sizes = [fused.result.shape[order.index(axis)] for axis in range(len(order))]
        width, keys, depth = (int(size) for size in notes["sizes"])
        counts = [int(size) if isinstance(size, tirx.IntImm) else 8 for size in sizes[:-1]]
        few = math.prod(counts[:-1]) * math.ceil(counts[-1] / 64) < _FEW_BLOCKS
        warps = (1, 4) if few else (4, 1)
        return cls(fused, tuple(operands), tuple(sizes[:-2]), sizes[-2], width, keys, depth, *warps)

    def emit(self, code: GpuCode) -> None:
        rows, threads = self.row_warps * 16, self.row_warps * self.key_warps * 32
        blocks = tirx.floordiv(index(self.length) + (rows - 1), index(rows))
        with code.launched(block_x=blocks, block_y=math.prod(self.lead, start=index(1)), thread_x=threads) as at:
            tile = code.shared("tile", self._shared_floats())
            heads = unravelled(code, at["block_y"], list(self.lead))
            row = at["block_x"] * rows
            starts = [operand.start(code, heads) for operand in self.operands]
            scale = tirx.const(float(str(self.fused.notes["scale"])), "float32")
            numbers = (tirx.Cast("int32", self.length), row, scale, tirx.address_of(tile[0]))
            code.call(self._instance(), *starts, *numbers, headers=("product.cuh", "attention.cuh"))
            self._finish(code, tile, heads, row, at["thread_x"], threads)

    def _instance(self) -> str:
        strides = [operand.strides[-2] for operand in self.operands[:3]]
        causal = "true" if int(self.fused.notes["causal"]) else "false"
        kind = _TYPES[str(self.operands[0].buffer.dtype)]
        sizes = (self.width, self.depth, self.keys, *strides, causal, self.row_warps, self.key_warps)
        parts = ", ".join(map(str, (kind, *sizes)))
        if len(self.operands) == 3:
            return f"graphopt::plain_attention<{parts}>"
        steps = self.operands[3].strides[-2:]
        return f"graphopt::masked_attention<{steps[0]}, {steps[1]}, {parts}>"

    def _shared_floats(self) -> int:
        rows, narrow = self.row_warps * 16, 2
        stage = _TILE_KEYS * ((self.width + self.depth) * narrow + 32)
        loading = 2 * stage + rows * (self.width * narrow + 16)
        result = 4 * (rows * (self.depth + _SKEW) + rows * self.key_warps * 2)
        return max(loading, result) // 4

    def _finish(self, code: GpuCode, tile: Any, heads: Sequence[Expr], row: Expr, thread: Expr, threads: int) -> None:
        """Every number of the tile through the epilogue to its place."""
        depth, rows = self.depth, self.row_warps * 16
        with code.loop("turn", rows * depth // threads) as turn:
            number = tirx.Cast("int32", turn) * threads + thread
            high = code.let("high", tirx.floordiv(number, depth))
            wide = code.let("wide", tirx.floormod(number, depth))
            with code.when(row + high < tirx.Cast("int32", self.length)):
                at = [*heads, index(row + high), index(wide)]
                value = tile[high * (depth + _SKEW) + wide]
                self.fused.epilogue.emit(code, value, [at[axis] for axis in _order(self.fused)])


def _order(fused: Fused) -> list[int]:
    return [int(axis) for axis in str(fused.notes["order"])]


def _two(block: Any) -> tuple[Any, Any]:
    """The two operands of a product, which may be one and the same."""
    sources = [read.source for read in block.reads]
    return sources[0], sources[-1]
