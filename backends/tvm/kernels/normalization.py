"""Layer norm, RMS norm and softmax: rows along the last axis, each read from the cache as often as it takes.

Statistics are those of the specification: the mean first, then the squares of what is left (two passes lose no digits
where a mean is large), and for softmax the largest element before any exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, index, lanes_of, unravelled
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.runs import Run, each_run, reduced_row

__all__ = ["normalization_kernel", "softmax", "standardized"]

_SERIAL_ELEMENTS = 2048
"""A result of fewer elements is not worth a second thread."""


def standardized(x: te.Tensor, eps: float, *, centred: bool) -> te.Tensor:
    """(x - mean) / sqrt(variance + eps) along the last axis, as a specification; without the mean if not `centred`."""
    *lead, width = x.shape
    count = tirx.Cast("float32", width)
    k, j = te.reduce_axis((0, width), "k"), te.reduce_axis((0, width), "j")
    total = te.compute(lead, lambda *at: te.sum(x(*at, k), axis=[k]), name="total") if centred else None

    def rest(at: Any, place: Any) -> Any:
        return x(*at, place) if total is None else x(*at, place) - total(*at) / count

    power = te.compute(lead, lambda *at: te.sum(rest(at, j) * rest(at, j), axis=[j]), name="power")

    def element(*at: Any) -> Any:
        return rest(at[:-1], at[-1]) * tirx.rsqrt(power(*at[:-1]) / count + tirx.const(eps, "float32"))

    notes = {ANCHOR: "standardized", "graphopt.eps": str(eps), "graphopt.centred": int(centred)}
    return te.compute(x.shape, element, name="standardized", attrs=notes)


def softmax(x: te.Tensor, *, log: bool = False) -> te.Tensor:
    """exp(x - max) / sum(exp(x - max)) along the last axis, or its logarithm, as a specification."""
    *lead, width = x.shape
    k, j = te.reduce_axis((0, width), "k"), te.reduce_axis((0, width), "j")
    peak = te.compute(lead, lambda *at: te.max(x(*at, k), axis=[k]), name="peak")
    total = te.compute(lead, lambda *at: te.sum(tirx.exp(x(*at, j) - peak(*at)), axis=[j]), name="total")

    def element(*at: Any) -> Any:
        rest = x(*at) - peak(*at[:-1])
        return rest - tirx.log(total(*at[:-1])) if log else tirx.exp(rest) / total(*at[:-1])

    return te.compute(x.shape, element, name="softmax", attrs={ANCHOR: "softmax", "graphopt.log": int(log)})


def normalization_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `standardized` and `softmax`; None when it is something else."""
    kinds = {"standardized": _Rows.standardize, "softmax": _Rows.softmax}
    kind = kinds.get(str(fused.notes["kernel"]))
    if kind is None or str(fused.result.dtype) != "float32":
        return None
    code = Code()
    _Rows(code, fused, machine.lanes).emit(kind)
    return fused.rewritten(code.done())


@dataclass
class _Rows:
    code: Code
    fused: Fused
    lanes: int

    def __post_init__(self) -> None:
        (self.source,) = self.fused.reads
        *self.lead, width = self.source.shape
        self.width = int(width) if isinstance(width, tirx.IntImm) else width

    def emit(self, kind: Callable[[_Rows, list[Any]], None]) -> None:
        rows = math.prod(self.lead, start=index(1))
        elements = math.prod(int(s) if isinstance(s, tirx.IntImm) else 0 for s in self.source.shape)
        with self.code.loop("row", rows, "serial" if 0 < elements < _SERIAL_ELEMENTS else "parallel") as row:
            kind(self, unravelled(self.code, row, self.lead))

    def standardize(self, row: list[Any]) -> None:
        code, count = self.code, tirx.Cast("float32", index(self.width))
        mean = None
        if int(self.fused.notes["centred"]):
            mean = code.let("mean", self._reduced(lambda run: self._load(row, run), 0, _add) / count)

        def rest(run: Run) -> Any:
            value = self._load(row, run)
            return value if mean is None else code.let("rest", value - lanes_of(mean, run.count))

        eps = tirx.const(float(str(self.fused.notes["eps"])), "float32")
        power = self._reduced(lambda run: _square(rest(run)), 0, _add)
        scale = code.let("scale", tirx.const(1, "float32") / tirx.sqrt(power / count + eps))

        def element(place: Any) -> Any:
            value = self.source[(*row, place)]
            return (value if mean is None else value - mean) * scale

        self._store(row, element)

    def softmax(self, row: list[Any]) -> None:
        """Exponentials are kept in work space from their sum to their division."""
        code = self.code
        peak = self._reduced(lambda run: self._load(row, run), -math.inf, tirx.max)
        if int(self.fused.notes["log"]):
            total = self._reduced(lambda run: tirx.exp(self._load(row, run) - lanes_of(peak, run.count)), 0, _add)
            shift = code.let("shift", tirx.log(total))
            self._store(row, lambda place: self.source[(*row, place)] - peak - shift)
            return
        kept = code.scratch("kept", [self.width])

        def exponential(run: Run) -> Any:
            code.store(kept, run.places, tirx.exp(self._load(row, run) - lanes_of(peak, run.count)))
            return kept[run.places]

        total = self._reduced(exponential, 0, _add)
        scale = code.let("scale", tirx.const(1, "float32") / total)
        self._store(row, lambda place: kept[place] * scale)

    def _load(self, row: list[Any], run: Run) -> Any:
        return self.code.let("value", self.source[(*row, run.places)])

    def _reduced(self, element: Callable[[Run], Any], neutral: float, combine: Callable[[Any, Any], Any]) -> Any:
        return reduced_row(self.code, self.width, self.lanes, element, neutral, combine)

    def _store(self, row: list[Any], element: Callable[[Any], Any]) -> None:
        def put(run: Run) -> None:
            with self.code.loop("lane", run.count, "vectorized") as lane:
                place = run.start + lane
                self.fused.epilogue.emit(self.code, element(place), [*row, place])

        each_run(self.code, self.width, self.lanes, put)


def _add(a: Any, b: Any) -> Any:
    return a + b


def _square(value: Any) -> Any:
    return value * value
