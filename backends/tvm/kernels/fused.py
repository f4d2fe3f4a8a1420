"""Reading a fused function: an anchor block that a kernel replaces, and the element-wise blocks that follow it.

Blocks whose results the anchor reads (the sums that a normalisation needs, say) belong to it: the kernel replaces them
as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from graphopt.backends.tvm.kernels.emit import Code, index

__all__ = ["ANCHOR", "Epilogue", "Fused", "read_chain", "read_fused", "substituted"]

ANCHOR = "graphopt.kernel"
"""Annotation of a block that a kernel may replace; its value says what the block computes."""


@dataclass(frozen=True)
class Epilogue:
    """What is computed from each element of the anchor's result on its way to the output.

    Attributes:
        steps: (buffer that a block writes, its value, its axes), in order; the last one writes the output.
    """

    source: Any
    steps: tuple[tuple[Any, Any, tuple[Any, ...]], ...]
    output: Any

    def emit(self, code: Code, value: Any, place: Sequence[Any]) -> None:
        """Store the output element at `place` (indices into the output), computed from the anchor's element there."""
        code.store(self.output, list(place), self.value(value, place))

    def value(self, value: Any, place: Sequence[Any]) -> Any:
        """The output element at `place`."""
        known: dict[Any, Any] = {self.source: value}
        for buffer, expression, axes in self.steps:
            known[buffer] = substituted(expression, known, dict(zip(axes, place, strict=True)))
        return known[self.output]


@dataclass(frozen=True)
class Fused:
    """A function of one anchor.

    Attributes:
        function: the function as the compiler fused it.
        anchor: the anchor block.
        before: the blocks before it, which the kernel replaces as well.
        notes: annotations of the anchor, without the common prefix.
        reads: parameters that the anchor and the blocks before it read, in the order of their operands.
        result: the buffer that the anchor writes.
        epilogue: what follows.
    """

    function: Any
    anchor: Any
    before: tuple[Any, ...]
    notes: Mapping[str, Any]
    reads: tuple[Any, ...]
    result: Any
    epilogue: Epilogue

    def rewritten(self, body: Any) -> Any:
        """The function with this body in place of its blocks."""
        attributes = {key: value for key, value in self.function.attrs.items() if key != "s_tir"}
        return tirx.PrimFunc(self.function.params, body).with_attrs(attributes)


def read_fused(function: Any) -> Fused | None:
    """Take a function apart; None when it has no anchor, several, or anything but element-wise blocks around it."""
    blocks = _blocks_of(function)
    return None if blocks is None else _fused(function, blocks, list(function.params))


def read_chain(function: Any) -> tuple[Fused, Fused] | None:
    """Take a function of two anchors apart, the second of which reads first what becomes of the result of the first.

    The parts are as they would be alone, with a buffer between them that is a parameter of both.
    """
    blocks = _blocks_of(function) or []
    anchors = [block for block in blocks if ANCHOR in block.annotations]
    if len(anchors) != 2:
        return None
    between = anchors[1].reads[0].source
    last = next((n for n, block in enumerate(blocks) if block.writes[0].source.same_as(between)), None)
    if last is None or _read_any(blocks[last + 1 :], blocks[:last]):
        return None
    if _read_any([block for block in blocks[last + 1 :] if not block.same_as(anchors[1])], blocks[: last + 1]):
        return None  # what follows the second anchor reads what is between them too
    params = list(function.params)
    first = _fused(function, blocks[: last + 1], [*params[:-1], between])
    second = _fused(function, blocks[last + 1 :], [*params[:-1], between, params[-1]])
    return None if first is None or second is None else (first, second)


def _blocks_of(function: Any) -> list[Any] | None:
    realize = function.body
    if not isinstance(realize, s_tir.SBlockRealize) or realize.block.name_hint != "root":
        return None
    return _blocks(realize.block.body)


def _fused(function: Any, blocks: list[Any], params: list[Any]) -> Fused | None:
    """The blocks with one anchor among them that compute the last of the parameters."""
    anchors = [block for block in blocks if ANCHOR in block.annotations]
    if len(anchors) != 1:
        return None
    (anchor,) = anchors
    before = _before(blocks, anchor)
    after = [block for block in blocks if not block.same_as(anchor) and _position(before, block) is None]
    notes = {str(k).removeprefix("graphopt."): v for k, v in anchor.annotations.items()}
    result, output = anchor.writes[0].source, params[-1]
    epilogue = _epilogue(after, result, output)
    if epilogue is None or _read_any(after, before):
        return None
    read = [r.source for block in (*before, anchor) for r in block.reads]
    unique: list[Any] = []
    for buffer in read:
        known = _position(params, buffer) is not None and _position(unique, buffer) is None
        if known and not buffer.same_as(output):
            unique.append(buffer)
    return Fused(function, anchor, tuple(before), notes, tuple(unique), result, epilogue)


def _blocks(statement: Any) -> list[Any]:
    if isinstance(statement, tirx.SeqStmt):
        return [block for part in statement.seq for block in _blocks(part)]
    if isinstance(statement, tirx.For):
        return _blocks(statement.body)
    return [statement.block] if isinstance(statement, s_tir.SBlockRealize) else []


def _before(blocks: Sequence[Any], anchor: Any) -> list[Any]:
    """The blocks whose results the anchor reads, or one of these reads. Others only happen to stand before it."""
    wanted = [read.source for read in anchor.reads]
    found: list[Any] = []
    for block in reversed(blocks):
        if not block.same_as(anchor) and _position(wanted, block.writes[0].source) is not None:
            found.insert(0, block)
            wanted += [read.source for read in block.reads]
    return found


def _read_any(blocks: Sequence[Any], writers: Sequence[Any]) -> bool:
    """Whether a block reads what one of the writers writes, which a kernel in their place does not keep."""
    written = [block.writes[0].source for block in writers]
    return any(_position(written, read.source) is not None for block in blocks for read in block.reads)


def _epilogue(blocks: Sequence[Any], source: Any, output: Any) -> Epilogue | None:
    steps, known, sizes = [], [source], [1]
    for block in blocks:
        store = block.body
        axes = tuple(axis.var for axis in block.iter_vars)
        if not isinstance(store, tirx.BufferStore) or not _same_places(store.indices, axes):
            return None
        if not _same_shape(store.buffer, source) or not _reads_in_place(store.value, known, axes):
            return None  # a result that is repeated along an axis has more elements than the kernel computes
        steps.append((store.buffer, store.value, axes))
        known.append(store.buffer)
        sizes.append(_written_out(store.value, known, sizes))
        if sizes[-1] > _LARGEST_EXPRESSION:
            return None
    return Epilogue(source, tuple(steps), output) if known[-1].same_as(output) else None


_LARGEST_EXPRESSION = 2000
"""Nodes of an element's expression once the steps are put into one another; a step read twice counts twice."""


def _written_out(value: Any, known: list[Any], sizes: list[int]) -> int:
    total = 0

    def count(node: Any) -> None:
        nonlocal total
        place = _position(known, node.source) if isinstance(node, ir.TensorLoad) else None
        total += 1 if place is None else sizes[place]

    tvm_ffi.structural_walk(value, (ir.Expr, count))
    return total


def _same_places(indices: Sequence[Any], axes: Sequence[Any]) -> bool:
    """Whether indices are the axes themselves; an axis of one element may be indexed by zero."""
    return len(indices) == len(axes) and all(i.same_as(a) for i, a in zip(indices, axes, strict=True))


def _same_shape(a: Any, b: Any) -> bool:
    return len(a.shape) == len(b.shape) and all(map(tvm_ffi.structural_equal, a.shape, b.shape))


def _reads_in_place(value: Any, known: list[Any], axes: Sequence[Any]) -> bool:
    """Whether every value of an earlier block is read at the very element that is computed."""
    right = True

    def check(load: Any) -> None:
        nonlocal right
        if _position(known, load.source) is not None and not _same_element(load, axes):
            right = False

    tvm_ffi.structural_walk(value, (ir.TensorLoad, check))
    return right


def _same_element(load: Any, axes: Sequence[Any]) -> bool:
    if len(load.indices) != len(axes):
        return False
    for place, axis, extent in zip(load.indices, axes, load.source.shape, strict=True):
        one = isinstance(extent, tirx.IntImm) and int(extent) == 1
        zero = isinstance(place, tirx.IntImm) and int(place) == 0
        if not (place.same_as(axis) or (one and zero)):
            return False
    return True


def _position(buffers: Sequence[Any], buffer: Any) -> int | None:
    return next((i for i, known in enumerate(buffers) if known.same_as(buffer)), None)


def substituted(expression: Any, values: Mapping[Any, Any], places: Mapping[Any, Any]) -> Any:
    """An expression with the loads of some buffers replaced by values, and its axes by places."""

    def load(node: Any) -> Any:
        return next((value for buffer, value in values.items() if buffer.same_as(node.source)), node)

    def axis(node: Any) -> Any:
        return next((index(place) for variable, place in places.items() if variable.same_as(node)), node)

    replaced = tvm_ffi.structural_map(expression, (tirx.Var, axis), order="post")
    return tvm_ffi.structural_map(replaced, (ir.TensorLoad, load), order="post")
