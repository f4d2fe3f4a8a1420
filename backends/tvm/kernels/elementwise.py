"""Functions that compute every element of their result by itself: element-wise chains, broadcasts, moves, gathers.

The blocks of the function are put into one another, so that one expression gives an element. Axes at the end that all
operands have in common, in place, are merged into one long row. Rows are computed in vectors. Where an operand is
read across the rows (a transposition), the axis that runs along its memory is the innermost loop, so that every line of
it that comes into the cache is used up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, s_tir, tirx

from graphopt.backends.tvm.kernels.emit import Code, flat, index, unravelled
from graphopt.backends.tvm.kernels.fused import substituted
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.runs import Run, each_run
from graphopt.backends.tvm.schedule import inline, vectorizable

__all__ = ["elementwise_kernel"]

_SERIAL_STEPS = 8192
"""Work of fewer steps (operations on vectors, about) is done before a second thread has begun."""

_LARGEST_EXPRESSION = 4000
"""Nodes of an element's expression. Blocks that are used twice count twice once they are put into their users."""


def elementwise_kernel(function: Any, machine: Machine, vector_calls: Collection[str]) -> Any | None:
    """The kernel of a function without reductions; None when it has some, or more than one block that writes.

    Args:
        vector_calls: elementary functions that have a vector form, as `exp:float32`.
    """
    realize = function.body
    if not isinstance(realize, s_tir.SBlockRealize) or realize.block.name_hint != "root":
        return None
    schedule = s_tir.Schedule(IRModule({"main": function}))
    inline(schedule)
    blocks = [schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]
    if len(blocks) != 1 or not _computes_elements(blocks[0]):
        return None
    (block,) = blocks
    inlined = schedule.mod["main"]
    if not any(block.body.buffer.same_as(param) for param in inlined.params):
        return None
    code = Code()
    _Elementwise(code, block, machine, vectorizable(block, vector_calls)).emit()
    attributes = {key: value for key, value in function.attrs.items() if key != "s_tir"}
    return tirx.PrimFunc(inlined.params, code.done()).with_attrs(attributes)


def _computes_elements(block: Any) -> bool:
    store, axes = block.body, block.iter_vars
    return (
        isinstance(store, tirx.BufferStore)
        and block.init is None
        and len(store.indices) == len(axes) > 0
        and all(axis.iter_type == tirx.IterVar.DataPar for axis in axes)
        and all(place.same_as(axis.var) for place, axis in zip(store.indices, axes, strict=True))
        and _nodes(store.value) <= _LARGEST_EXPRESSION
    )


def _nodes(expression: Any) -> int:
    count = 0

    def note(_: Any) -> None:
        nonlocal count
        count += 1

    tvm_ffi.structural_walk(expression, (ir.Expr, note))
    return count


@dataclass
class _Elementwise:
    code: Code
    block: Any
    machine: Machine
    in_vectors: bool

    def __post_init__(self) -> None:
        self.output, self.value = self.block.body.buffer, self.block.body.value
        self.axes = [axis.var for axis in self.block.iter_vars]
        self.sizes = list(self.output.shape)
        self.lanes = self.machine.lanes if self.in_vectors else 1

    def emit(self) -> None:
        if any(isinstance(size, tirx.IntImm) and int(size) == 0 for size in self.sizes):
            return  # nothing to compute
        merged = self._merged_axes()
        if merged > 1:
            self._merge(merged)
        width = _constant(self.sizes[-1])
        turned = self._turned_axis()
        outer = [axis for axis in range(len(self.sizes) - 1) if axis != turned]
        chunks = self._chunks(outer, width)
        total = math.prod((self.sizes[axis] for axis in outer), start=index(1))
        kind = "serial" if self._steps() < _SERIAL_STEPS else "parallel"
        with self.code.loop("task", total * chunks if chunks > 1 else total, kind) as task:
            row = self.code.let("row_number", tirx.floordiv(task, index(chunks))) if chunks > 1 else task
            at = dict(zip(outer, unravelled(self.code, row, [self.sizes[axis] for axis in outer]), strict=True))
            if chunks == 1:
                whole = width or self.sizes[-1]
                each_run(self.code, whole, self.lanes, lambda run: self._run(at, run, index(0), turned))
            else:
                chunk = width // chunks
                first = self.code.let("first", tirx.floormod(task, index(chunks)) * chunk)
                each_run(self.code, chunk, self.lanes, lambda run: self._run(at, run, first, turned))

    def _run(self, at: dict[int, Any], run: Run, first: Any, turned: int | None) -> None:
        """Compute a run of a row that begins at `first`; of all rows along the turned axis, if there is one."""
        code, start = self.code, first + run.start
        with code.loop("across", 1 if turned is None else self.sizes[turned]) as across:
            places = [at.get(axis, across) for axis in range(len(self.sizes) - 1)]
            with code.loop("lane", run.count, "vectorized") as lane:
                place = [*places, start + lane]
                value = substituted(self.value, {}, dict(zip(self.axes, place, strict=True)))
                code.store(self.output, place, value)

    def _steps(self) -> float:
        """Operations on vectors, roughly; infinite when a size is free."""
        sizes = [_constant(size) for size in self.sizes]
        if 0 in sizes:
            return math.inf
        return math.prod(sizes) / self.lanes * _nodes(self.value) / 2

    def _chunks(self, outer: Sequence[int], width: int) -> int:
        """Into how many equal parts to cut rows, so that few long rows keep all threads busy."""
        rows = math.prod(_constant(self.sizes[axis]) for axis in outer)
        wanted = 4 * self.machine.threads
        if not width or not 0 < rows < wanted:
            return 1
        fitting = (c for c in range(-(-wanted // rows), 0, -1) if width % (c * self.lanes) == 0)
        return next(fitting, 1)

    def _turned_axis(self) -> int | None:
        """The axis that runs along the memory of an operand whose memory the last axis runs across."""
        if len(self.axes) < 2:
            return None
        last = self.axes[-1]
        for load in _loads(self.value):
            if not load.indices or _uses(load.indices[-1], last) or not any(_uses(i, last) for i in load.indices):
                continue
            for axis, variable in enumerate(self.axes[:-1]):
                if variable.same_as(load.indices[-1]):
                    return axis
        return None

    def _merged_axes(self) -> int:
        """How many axes at the end every operand has in place, or does not have at all."""
        count = 1
        while count < len(self.axes) and self._merges(count + 1):
            count += 1
        return count if self._merges(count) else 1

    def _merges(self, count: int) -> bool:
        last, sizes = self.axes[-count:], self.sizes[-count:]
        if any(_constant(size) == 0 for size in sizes) or self._used_outside_of_loads(last):
            return False
        for load in _loads(self.value):
            in_place = len(load.indices) >= count and all(
                place.same_as(axis) and _constant(size) == _constant(extent)
                for place, axis, size, extent in zip(
                    load.indices[-count:], last, sizes, load.source.shape[-count:], strict=True
                )
            )
            before = load.indices[:-count] if in_place else load.indices
            if any(_uses(place, axis) for place in before for axis in last):
                return False
        return True

    def _used_outside_of_loads(self, axes: Sequence[Any]) -> bool:
        bare = tvm_ffi.structural_map(
            self.value, (ir.TensorLoad, lambda load: tirx.const(0, str(load.ty.dtype))), order="post"
        )
        return any(_uses(bare, axis) for axis in axes)

    def _merge(self, count: int) -> None:
        """Make one axis of the last `count`; buffers become views in which they are one."""
        last, width = self.axes[-count:], math.prod(_constant(size) for size in self.sizes[-count:])
        row, views = tirx.Var("row", "int64"), dict[Any, Any]()

        def view(buffer: Any) -> Any:
            known = next((v for b, v in views.items() if b.same_as(buffer)), None)
            if known is None:
                known = views[buffer] = flat(self.code, buffer)
            return known

        def merged(load: Any) -> Any:
            if len(load.indices) < count or not load.indices[-1].same_as(last[-1]):
                return load
            number: Any = index(0)
            for place, size in zip(load.indices[:-count], load.source.shape[:-count], strict=True):
                number = number * index_of(size) + index_of(place)
            return view(load.source)[number * width + row]

        self.value = tvm_ffi.structural_map(self.value, (ir.TensorLoad, merged), order="post")
        outer = self.sizes[:-count]
        lines = tirx.decl_buffer((*outer, index(width)), self.output.dtype, f"{self.output.name}_rows")
        self.code.add(tirx.DeclBuffer(lines, data=tirx.buffer.buffer_data(self.output)))
        self.output, self.sizes, self.axes = lines, [*outer, index(width)], [*self.axes[:-count], row]


def index_of(value: Any) -> Any:
    return index(int(value)) if isinstance(value, tirx.IntImm) else index(value)


def _constant(size: Any) -> int:
    """A size as a number; 0 when it is not a constant."""
    return int(size) if isinstance(size, int | tirx.IntImm) else 0


def _loads(expression: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(expression, (ir.TensorLoad, found.append))
    return found


def _uses(expression: Any, variable: Any) -> bool:
    found = False

    def look(other: Any) -> None:
        nonlocal found
        found = found or other.same_as(variable)

    tvm_ffi.structural_walk(expression, (tirx.Var, look))
    return found
