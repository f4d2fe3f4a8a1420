"""A simple schedule for CPU code: safe, general, far from the best.

Every function is treated block by block. What is element-wise is inlined into its consumer. A product (a sum of
multiplications: convolution, matrix product) is computed in tiles of accumulators that fit the vector registers,
with the reduction outside the tile and what follows it (bias, activation) at the tile. Everything else runs in
parallel over its outer loops, vectorised along the last one. A block that a rule cannot handle stays as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, s_tir, tirx

__all__ = ["ELEMENTARY", "holds_bfloat16", "inline", "schedule_function", "vectorizable"]

_LANES = 8
_ACCUMULATORS = 12
"""Vectors of a tile; with two operands in flight they fit the 16 registers of AVX2."""

_WIDEST = 32
"""Longest run of elements that is vectorised at once."""


ELEMENTARY = ("exp", "sigmoid", "tanh", "erf")


def schedule_function(function: tirx.PrimFunc, vector_calls: Collection[str] = ()) -> tirx.PrimFunc:
    """Schedule one function for parallel vector code.

    Args:
        vector_calls: elementary functions that have a vector form, as `exp:float32`.
    """
    body = function.body
    if not isinstance(body, s_tir.SBlockRealize) or body.block.name_hint != "root":
        return function  # written by hand, such as a scan or a scatter
    schedule = s_tir.Schedule(IRModule({"main": function}))
    inline(schedule)
    for block in _blocks(schedule):
        trial = schedule.copy()
        try:
            _apply_rule(trial, trial.get_sblock(schedule.get(block).name_hint), vector_calls)
        except s_tir.ScheduleError:
            continue  # this block stays as it was
        schedule = trial
    return schedule.mod["main"].with_attrs(function.attrs)


def _blocks(schedule: s_tir.Schedule) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def inline(schedule: s_tir.Schedule) -> None:
    """Inline element-wise blocks into their consumers, but not into products, which would compute them many times."""
    for block in _blocks(schedule):
        consumers = schedule.get_consumers(block)
        if not consumers or _is_reduction(schedule, block) or any(_is_reduction(schedule, c) for c in consumers):
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            continue  # it stays a block of its own


def _is_reduction(schedule: s_tir.Schedule, block: Any) -> bool:
    return any(var.iter_type == tirx.IterVar.CommReduce for var in schedule.get(block).iter_vars)


def _is_product(schedule: s_tir.Schedule, block: Any) -> bool:
    body = schedule.get(block).body
    return (
        _is_reduction(schedule, block)
        and isinstance(body, tirx.BufferStore)
        and isinstance(body.value, tirx.Add)
        and isinstance(body.value.b, tirx.Mul)
    )


def _apply_rule(schedule: s_tir.Schedule, block: Any, vector_calls: Collection[str]) -> None:
    producers = [p for p in schedule.get_producers(block) if _is_product(schedule, p)]
    if producers and not _is_reduction(schedule, block):
        return  # scheduled with its producer
    if _is_product(schedule, block) and _tile(schedule, block, vector_calls):
        return
    _parallel(schedule, block, vector_calls)


def _extent(schedule: s_tir.Schedule, loop: Any) -> int | None:
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _divisor(extent: int | None, limit: int) -> int:
    """The largest divisor up to a limit; 1 for a dynamic extent."""
    if extent is None:
        return 1
    return max(size for size in range(1, min(extent, limit) + 1) if extent % size == 0)


def _vector_width(extent: int | None, limit: int) -> int:
    """A divisor to vectorise by: a whole number of vectors where there is one, else the largest."""
    if extent is not None:
        for size in range(limit, 0, -_LANES):
            if extent % size == 0:
                return size
    return _divisor(extent, limit)


def _tile(schedule: s_tir.Schedule, product: Any, vector_calls: Collection[str]) -> bool:
    """Compute a product in register tiles; False when its last axis is too short or dynamic."""
    consumers = schedule.get_consumers(product)
    spatial = _loops_of_kind(schedule, product, tirx.IterVar.DataPar)
    rank = len(spatial)
    if len(consumers) > 1 or not spatial:
        return False
    rows = 1 if "conv" in schedule.get(product).name_hint else rank - 2
    row_extent = _extent(schedule, spatial[rows]) if 0 <= rows < rank - 1 else None
    limit = 2 * _WIDEST if row_extent in (None, 1) else _WIDEST // 2
    width = _vector_width(_extent(schedule, spatial[-1]), limit)
    if width < 4:
        return False
    if consumers:
        schedule.set_scope(product, 0, "local")
    (last,) = consumers or [schedule.cache_write(product, 0, "local")]
    loops = schedule.get_loops(last)
    if len(loops) != rank:
        return False
    height = _divisor(row_extent, _ACCUMULATORS // -(-width // _LANES)) if row_extent else 1
    outer, column = schedule.split(loops[-1], [None, width])
    inner, outers = [column], [*loops[:-1], outer]
    if height > 1:
        outers[rows], row = schedule.split(loops[rows], [None, height])
        inner.insert(0, row)
    schedule.reorder(*outers, *inner)
    whole = schedule.fuse(*outers)
    schedule.parallel(whole)
    schedule.compute_at(product, whole, preserve_unit_loops=True)
    loops = schedule.get_loops(product)[1:]
    spatial, reduction = loops[:rank], loops[rank:]
    schedule.reorder(*reduction, *spatial)
    _unroll_tile(schedule, spatial)
    if vectorizable(schedule.get(last), vector_calls):
        _unroll_tile(schedule, inner)
    init = schedule.decompose_reduction(product, reduction[0])
    _unroll_tile(schedule, schedule.get_loops(init)[1:])
    return True


def _unroll_tile(schedule: s_tir.Schedule, loops: list[Any]) -> None:
    schedule.vectorize(loops[-1])
    for loop in loops[:-1]:
        schedule.unroll(loop)


def _parallel(schedule: s_tir.Schedule, block: Any, vector_calls: Collection[str]) -> None:
    """Parallel over the outer spatial loops; the last one vectorised when the block is element-wise."""
    spatial = _loops_of_kind(schedule, block, tirx.IterVar.DataPar)
    reduction = _loops_of_kind(schedule, block, tirx.IterVar.CommReduce)
    if not spatial or len(spatial) + len(reduction) != len(schedule.get_loops(block)):
        return
    if reduction:
        schedule.reorder(*spatial, *reduction)
        schedule.parallel(schedule.fuse(*spatial))
        schedule.decompose_reduction(block, reduction[0])
        return
    width = _vector_width(_extent(schedule, spatial[-1]), _WIDEST)
    outer, column = schedule.split(spatial[-1], [None, width])
    schedule.parallel(schedule.fuse(*spatial[:-1], outer))
    if width > 1 and vectorizable(schedule.get(block), vector_calls):
        schedule.vectorize(column)


def _loops_of_kind(schedule: s_tir.Schedule, block: Any, kind: int) -> list[Any]:
    """The loops of a block over its axes of one kind; empty when loops and axes do not match one to one."""
    kinds = [var.iter_type for var in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    return [loop for loop, k in zip(loops, kinds, strict=True) if k == kind] if len(kinds) == len(loops) else []


_VECTOR_CALLS = {"fabs", "floor", "trunc", "nearbyint", "sqrt", "log"}


def vectorizable(block: Any, vector_calls: Collection[str]) -> bool:
    """Whether there is a vector form of every function that a block calls; TVM has no vectors of bfloat16."""
    if holds_bfloat16(block.body):
        return False
    calls: list[str] = []

    def note(call: Any) -> None:
        name = getattr(call.op, "name", "").removeprefix("tirx.")
        calls.append(f"{name}:{call.ty.dtype}" if name in ELEMENTARY else name)

    tvm_ffi.structural_walk(block.body, (ir.Call, note))
    return {*_VECTOR_CALLS, *vector_calls}.issuperset(calls)


def holds_bfloat16(code: Any) -> bool:
    """Whether some value in an expression or statement is of bfloat16."""
    found = False

    def look(value: Any) -> None:
        nonlocal found
        found = found or str(getattr(value.ty, "dtype", "")) == "bfloat16"

    tvm_ffi.structural_walk(code, (ir.Expr, look))
    return found
