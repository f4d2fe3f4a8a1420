"""Attention: softmax(query key^T scale + mask) value, without scores in memory.

A task computes some queries of one head. They are turned so that a vector holds one feature of several queries; the
scores then come out with a key per row and a query per lane, and the softmax needs no sums across lanes. The scores of
the task stay in the cache until the values have been weighted with them. (The idea of keeping scores near the core is
that of Dao et al., "FlashAttention", NeurIPS 2022; here all keys fit at once, and no sum is rescaled.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, flat, index, lanes_of, unravelled, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused, substituted
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import column_of
from graphopt.backends.tvm.kernels.strided import Strided
from graphopt.backends.tvm.kernels.tile import Parts, accumulate, best_tile, each_part, finish

__all__ = ["Operand", "attention", "attention_kernel"]


@dataclass(frozen=True)
class Operand:
    """A tensor: the order in which its axes lie in `tensor`, or where in it they lie if it is only a part of that."""

    tensor: te.Tensor
    order: tuple[int, ...]
    place: Strided | None = None

    @property
    def sizes(self) -> list[Any]:
        if self.place is not None:
            return list(self.place.sizes)
        return [self.tensor.shape[self.order.index(axis)] for axis in range(len(self.order))]

    def read(self, at: Sequence[Any]) -> Any:
        if self.place is not None:
            return self.place.element(self.tensor, at)
        return self.tensor(*(at[axis] for axis in self.order))

    @property
    def note(self) -> str:
        """What the kernel has to know of it."""
        if self.place is None:
            return "".join(map(str, self.order))
        rows = (self.place.offset,), self.place.strides, self.place.sizes
        return ";".join(",".join(map(str, row)) for row in rows)


def attention(
    query: Operand, key: Operand, value: Operand, mask: Operand | None, scale: float, *, causal: bool, order: str
) -> te.Tensor:
    """query [..., L, E], key [..., S, E], value [..., S, V] to [..., L, V], stored in `order`, as a specification.

    Keys and values may have fewer heads (the axis before the last two); each serves as many consecutive heads of the
    query. A mask of booleans tells which scores count, one of numbers is added. Where none counts the result is zero.
    """
    (*lead, length, width), (*_, keys, depth) = query.sizes, value.sizes
    times = _times(query.sizes, key.sizes)

    def shared(at: Sequence[Any]) -> list[Any]:
        return [*at[:-1], tirx.floordiv(at[-1], times)] if times > 1 else list(at)

    e, s = te.reduce_axis((0, width), "e"), te.reduce_axis((0, keys), "s")
    factor = tirx.const(scale, "float32")

    def product(*at: Any) -> Any:
        *heads, place, j = at
        return te.sum(query.read([*heads, place, e]) * factor * key.read([*shared(heads), j, e]), axis=[e])

    scores = te.compute((*lead, length, keys), product, name="scores")
    if mask is not None or causal:
        scores = te.compute(scores.shape, lambda *at: _masked(scores(*at), at, mask, causal), name="masked")
    j, i = te.reduce_axis((0, keys), "j"), te.reduce_axis((0, keys), "i")
    peak = te.compute((*lead, length), lambda *at: te.max(scores(*at, j), axis=[j]), name="peak")
    total = te.compute(
        (*lead, length), lambda *at: te.sum(tirx.exp(scores(*at, i) - peak(*at)), axis=[i]), name="total"
    )

    def weight(*at: Any) -> Any:
        known = total(*at[:-1])
        share = tirx.exp(scores(*at) - peak(*at[:-1])) / known
        return tirx.Select(known == tirx.const(0, "float32"), tirx.const(0, "float32"), share)

    weights = te.compute(scores.shape, weight, name="weights")
    axes = [int(axis) for axis in order]
    shape = (*lead, length, depth)

    def element(*stored: Any) -> Any:
        *heads, place, v = (stored[axes.index(axis)] for axis in range(len(axes)))
        return te.sum(weights(*heads, place, s) * value.read([*shared(heads), s, v]), axis=[s])

    operands = "/".join(operand.note for operand in (query, key, value))
    notes = {
        ANCHOR: "attention",
        "graphopt.operands": operands,
        "graphopt.order": order,
        "graphopt.scale": str(scale),
    }
    return te.compute([shape[axis] for axis in axes], element, name="attention", attrs=notes)


def _times(query: Sequence[Any], key: Sequence[Any]) -> int:
    """How many heads of the query each of the key serves."""
    if len(query) < 3:
        return 1
    heads, fewer = query[-3], key[-3]
    known = all(isinstance(size, int | tirx.IntImm) for size in (heads, fewer))
    return int(heads) // int(fewer) if known else 1


def _masked(score: Any, at: Sequence[Any], mask: Operand | None, causal: bool) -> Any:
    none = tirx.const(-math.inf, "float32")
    if causal:
        score = tirx.Select(at[-1] <= at[-2], score, none)
    if mask is None:
        return score
    sizes = mask.sizes
    places = [index(0) if _is_one(n) else i for n, i in zip(sizes, at[len(at) - len(sizes) :], strict=True)]
    entry = mask.read(places)
    return tirx.Select(entry, score, none) if str(entry.ty.dtype) == "bool" else score + entry


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


def attention_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `attention`; None when it is something else, or values are narrower than a vector."""
    if fused.notes["kernel"] != "attention" or str(fused.result.dtype) != "float32":
        return None
    code = Code()
    kernel = _Attention(code, fused, machine)
    if not all(isinstance(size, tirx.IntImm) for size in (kernel.width, kernel.depth)):
        return None
    if int(kernel.depth) < machine.lanes or not kernel.value.in_rows:
        return None
    kernel.emit()
    return fused.rewritten(code.done())


@dataclass(frozen=True)
class _Stored:
    """A buffer; the sizes of the tensor in it, and how its axes lie: in an order, or from an offset in strides."""

    buffer: Any
    sizes: list[Any]
    axes: tuple[int, ...]
    strides: tuple[int, ...] = ()
    offset: int = 0

    @classmethod
    def of(cls, code: Code, buffer: Any, note: str) -> _Stored:
        if ";" not in note:
            axes = tuple(map(int, note))
            return cls(buffer, [buffer.shape[axes.index(axis)] for axis in range(len(axes))], axes)
        (offset,), strides, sizes = (tuple(map(int, row.split(","))) for row in note.split(";"))
        return cls(flat(code, buffer), [index(size) for size in sizes], (), strides, offset)

    @property
    def in_rows(self) -> bool:
        """Whether neighbours along the last axis are neighbours in memory."""
        return self.strides[-1] == 1 if self.strides else self.axes[-1] == len(self.axes) - 1

    def read(self, at: Sequence[Any]) -> Any:
        if not self.strides:
            return self.buffer[tuple(at[axis] for axis in self.axes)]
        return self.buffer[index(self.offset) + sum(i * step for i, step in zip(at, self.strides, strict=True))]


_VECTORS = 2
"""Vectors of queries that a task works on: with six keys at a time they fill the registers of AVX2."""


@dataclass
class _Attention:
    code: Code
    fused: Fused
    machine: Machine

    def __post_init__(self) -> None:
        notes = str(self.fused.notes["operands"]).split("/")
        self.order = tuple(map(int, str(self.fused.notes["order"])))
        before = {block.name_hint: block for block in self.fused.before}
        read = [region.source for region in before["scores"].reads]  # one, where query and key lie in one tensor
        weights = self.fused.before[-1].writes[0].source
        (value,) = (r.source for r in self.fused.anchor.reads if not r.source.same_as(weights))
        buffers = (read[0], read[-1], value)
        self.query, self.key, self.value = map(partial(_Stored.of, self.code), buffers, notes)
        self.scores, self.masked = before["scores"].writes[0].source, before.get("masked")
        *self.lead, self.length, self.width = self.query.sizes
        *_, self.keys, self.depth = self.value.sizes
        self.times = _times(self.query.sizes, self.key.sizes)
        self.lanes = self.machine.lanes
        self.most = int(self.length) if isinstance(self.length, tirx.IntImm) else 0
        (vectors,) = self.machine.choices.division or (_VECTORS,)
        self.vectors = min(vectors, -(-self.most // self.lanes)) if self.most else vectors
        self.block = self.vectors * self.lanes

    def emit(self) -> None:
        code, length = self.code, index(self.length)
        blocks = code.let("blocks", tirx.floordiv(length + (self.block - 1), index(self.block)))
        heads = math.prod(self.lead, start=index(1))
        with code.loop("task", heads * blocks, "parallel") as task:
            head = unravelled(code, tirx.floordiv(task, blocks), self.lead)
            start = tirx.min(tirx.floormod(task, blocks) * self.block, length - self.block)
            first = code.let("first", start if self.most >= self.block else tirx.max(start, index(0)))
            shared = [*head[:-1], tirx.floordiv(head[-1], index(self.times))] if self.times > 1 else head
            turned = code.scratch("turned", [int(self.width), self.block])
            kept = code.scratch("kept", [index(self.keys), self.block])
            self._turn(head, first, turned)
            self._score(head, shared, first, turned, kept)
            scales = self._normalize(kept)
            self._weigh(head, shared, first, kept, scales)

    def _query(self, place: Any) -> Any:
        """A query that exists: the lanes beyond the last one repeat it."""
        return place if self.most >= self.block else tirx.min(place, index(self.length) - 1)

    def _turn(self, head: list[Any], first: Any, turned: Any) -> None:
        code, scale = self.code, tirx.const(float(str(self.fused.notes["scale"])), "float32")
        with code.loop("query", self.block) as i:
            place = code.let("place", self._query(first + i))
            with code.loop("feature", int(self.width)) as e:
                code.store(turned, [e, i], self.query.read([*head, place, e]) * scale)

    def _score(self, head: list[Any], shared: list[Any], first: Any, turned: Any, kept: Any) -> None:
        code, lanes = self.code, self.lanes

        def tile(row: Any, tall: int) -> None:
            row = code.let("key", row)
            sums = accumulate(
                code,
                (tall, self.vectors),
                lanes,
                [int(self.width)],
                lambda p, e: self.key.read([*shared, row + p, e]),
                lambda q, e: turned[e, vector(q * lanes, lanes)],
            )

            def store(p: int, q: int, value: Any, lane: Any) -> None:
                place = self._query(first + (lane + q * lanes)) if self.masked is not None else first
                code.store(kept, [row + p, lane + q * lanes], self._with_mask(value, [*head, place, row + p]))

            finish(code, sums, lanes, lanes, store)

        tall = (self.machine.registers - 1 - self.vectors) // self.vectors
        if isinstance(self.keys, tirx.IntImm):
            each_part(code, "keys", Parts.of(int(self.keys), tall), tile)
            return
        whole = code.let("tiles", tirx.floordiv(self.keys, index(tall)))
        with code.loop("keys", whole) as i:
            tile(i * tall, tall)
        with code.loop("rest", self.keys - whole * tall) as i:
            tile(whole * tall + i, 1)

    def _with_mask(self, score: Any, at: list[Any]) -> Any:
        if self.masked is None:
            return score
        axes = [axis.var for axis in self.masked.iter_vars]
        return substituted(self.masked.body.value, {self.scores: score}, dict(zip(axes, at, strict=True)))

    def _normalize(self, kept: Any) -> Any:
        """Exponentials in place of scores; returns one over their sums, per query."""
        code, lanes = self.code, self.lanes
        scales = code.local("scales", self.block)
        for q in range(self.vectors):
            place = vector(q * lanes, lanes)
            peak, total = code.local("peak", lanes), code.local("total", lanes)
            whole = vector(0, lanes)
            code.store(peak, whole, lanes_of(tirx.min_value("float32"), lanes))
            with code.loop("key", self.keys) as s:
                code.store(peak, whole, tirx.max(peak[whole], kept[s, place]))
            code.store(total, whole, lanes_of(tirx.const(0, "float32"), lanes))
            with code.loop("key", self.keys) as s:
                code.store(kept, [s, place], tirx.exp(kept[s, place] - peak[whole]))
                code.store(total, whole, total[whole] + kept[s, place])
            one, zero = (lanes_of(tirx.const(n, "float32"), lanes) for n in (1, 0))
            code.store(scales, place, tirx.Select(total[whole] == zero, zero, one / total[whole]))
        return scales

    def _weigh(self, head: list[Any], shared: list[Any], first: Any, kept: Any, scales: Any) -> None:
        code, lanes, depth = self.code, self.lanes, int(self.depth)
        rows = self.most if 0 < self.most < self.block else self.block
        tall, wide = best_tile(rows, -(-depth // lanes), self.machine)

        def tile(row: Any, tall: int, number: Any, wide: int) -> None:
            starts = [code.let("start", column_of(code, number + q, depth, lanes)) for q in range(wide)]
            sums = accumulate(
                code,
                (tall, wide),
                lanes,
                [index(self.keys)],
                lambda p, s: kept[s, row + p],
                lambda q, s: self.value.read([*shared, s, vector(starts[q], lanes)]),
            )

            def store(p: int, q: int, value: Any, lane: Any) -> None:
                at = [*head, first + row + p, starts[q] + lane]
                place = [at[axis] for axis in self.order]
                self.fused.epilogue.emit(code, value * scales[row + p], place)

            def row_of(p: int) -> Callable[[int, int, Any, Any], None]:
                return lambda _, q, value, lane: store(p, q, value, lane)

            if self.most:
                finish(code, sums, lanes, lanes, store)
                return
            for p in range(tall):
                with code.when(first + row + p < index(self.length)):
                    finish(code, [sums[p]], lanes, lanes, row_of(p))

        each_part(code, "rows", tall, lambda p, t: each_part(code, "vectors", wide, lambda q, w: tile(p, t, q, w)))
