"""Finds where the elements of a tensor lie that is part of another, so that kernels read it there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import ir, relax, s_tir, sym, tirx

from graphopt.backends.tvm.kernels.fused import substituted
from graphopt.backends.tvm.kernels.strided import Strided
from graphopt.backends.tvm.layout import Ordered
from graphopt.backends.tvm.registry import Call, shape_of

__all__ = ["strided"]


def strided(call: Call, tensor: Ordered) -> Strided | None:
    """Where the elements of a tensor lie, beyond reshapes and copied parts; None where a stride is not a number."""
    stored = _row_strides(shape_of(tensor.value))
    if stored is None:
        return None
    steps = [stored[tensor.order.index(axis)] for axis in range(len(tensor.order))]
    sizes = tuple(tensor.shape)
    found = Strided(tensor.value, sizes, tuple(0 if n == 1 else s for n, s in zip(sizes, steps, strict=True)), 0)
    while True:
        behind = _behind(call, found)
        if behind is None:
            return found
        found = behind


def _row_strides(shape: Sequence[Any]) -> list[int] | None:
    """Strides of a dense tensor; only the first size may be unknown."""
    if not all(isinstance(size, int) for size in shape[1:]):
        return None
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _behind(call: Call, found: Strided) -> Strided | None:
    """The same elements in the value that this value is a reshape or a copied part of; None when it is neither."""
    if not isinstance(found.value, relax.Var):
        return None
    made = call.builder.lookup_binding(found.value)
    if isinstance(made, relax.Var):
        return Strided(made, found.sizes, found.strides, found.offset)
    if not isinstance(made, ir.Call):
        return None
    if made.op.same_as(ir.Op.get("relax.reshape")):
        return Strided(made.args[0], found.sizes, found.strides, found.offset)
    if made.op.same_as(ir.Op.get("relax.call_tir")) and len(made.args[1].fields) == 1:
        source = made.args[1].fields[0]
        moves = _moves(call.builder.get()[made.args[0]])
        into = _row_strides(shape_of(source))
        shape = shape_of(found.value)
        if moves is not None and into is not None and all(isinstance(size, int) for size in shape):
            return _through(found, source, shape, moves, into)
    return None


_Moves = tuple[list[int], list[list[int]]]
"""Indices of the source for the first element of a copy, and how they change along each axis of the copy."""


def _moves(function: Any) -> _Moves | None:
    """How a function that copies part of its input walks through it; None when it does anything else."""
    blocks: list[Any] = []
    statement = function.body.block.body if isinstance(function.body, s_tir.SBlockRealize) else None
    while isinstance(statement, tirx.For):
        statement = statement.body
    if isinstance(statement, s_tir.SBlockRealize):
        blocks.append(statement.block)
    if len(blocks) != 1 or not isinstance(blocks[0].body, tirx.BufferStore):
        return None
    block, load = blocks[0], blocks[0].body.value
    if not isinstance(load, ir.TensorLoad) or block.init is not None:
        return None
    axes, analyzer = [axis.var for axis in block.iter_vars], sym.Analyzer()
    first = [_value(index, axes, None) for index in load.indices]
    if None in first:
        return None
    steps = [
        [(_value(index, axes, axis) or 0) - (start or 0) for index, start in zip(load.indices, first, strict=True)]
        for axis in axes
    ]
    for place, index in enumerate(load.indices):
        line = sum(
            (axis * step[place] for axis, step in zip(axes, steps, strict=True)), tirx.const(first[place], "int64")
        )
        if not analyzer.can_prove_equal(index, line):
            return None
    return [start or 0 for start in first], steps


def _value(index: Any, axes: Sequence[Any], one: Any) -> int | None:
    """An index where all axes are zero, but one may be one."""
    places = {axis: int(one is not None and axis.same_as(one)) for axis in axes}
    result = sym.Analyzer().simplify(substituted(index, {}, places))
    return int(result) if isinstance(result, tirx.IntImm) else None


def _through(found: Strided, source: Any, shape: list[int], moves: _Moves, into: list[int]) -> Strided | None:
    """Strides in a copy as strides in what was copied: each axis has to stay within one axis of the copy."""
    first, steps = moves
    digits = _row_strides(shape) or []
    step_of = [sum(step * stride for step, stride in zip(along, into, strict=True)) for along in steps]
    room, rest, offset = [], found.offset, sum(i * stride for i, stride in zip(first, into, strict=True))
    for digit, size in enumerate(shape):
        place, rest = divmod(rest, digits[digit])
        offset += place * step_of[digit]
        room.append(size - 1 - place)
    strides = []
    for size, stride in zip(found.sizes, found.strides, strict=True):
        if stride == 0:
            strides.append(0)
            continue
        within = next((d for d, n in enumerate(shape) if n > 1 and digits[d] <= stride), None)
        if within is None or not isinstance(size, int) or stride % digits[within]:
            return None
        room[within] -= (size - 1) * (stride // digits[within])
        strides.append(stride // digits[within] * step_of[within])
    return None if min(room) < 0 else Strided(source, found.sizes, tuple(strides), offset)
