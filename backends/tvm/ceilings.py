"""What this machine can do at most, measured by two small kernels: multiply-adds, and a copy through memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm import IRModule, tirx, transform
from tvm import compile as tvm_compile

from graphopt.backends.tvm.backend import tvm_target
from graphopt.backends.tvm.kernels.emit import Code, index, vector
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.pipeline import CPU_CODE
from graphopt.backends.tvm.runtime import aligned, ffi, use_threads
from graphopt.target import this_machine

__all__ = ["Ceilings", "Gauge", "measured_ceilings"]

_STEPS = 1_000_000
"""Multiply-adds of each accumulator: some milliseconds."""

_LEAST_COPY, _MOST_COPY = 64 << 20, 512 << 20
_CACHES = 4
"""How many times the last cache the copied array is, so that it does not stay there."""

_ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """The best of some rounds on a number of threads.

    Attributes:
        flops: float32 operations per second, a multiply-add being two.
        bytes: bytes read plus bytes written per second.
    """

    threads: int
    flops: float
    bytes: float


class Gauge:
    """Measures what this machine can do now: the clock, and what neighbours leave of the memory, change by a tenth from
    one second to the next. Nothing else should be running."""

    def __init__(self, threads: int) -> None:
        here = this_machine()
        machine = Machine.of(here, threads)
        size = max(_LEAST_COPY, min(_MOST_COPY, _CACHES * here.l3)) // 4
        width = threads * machine.lanes
        size -= size % width
        sums = machine.registers - 4
        functions = {"multiply": _multiply(machine, sums), "copy": _copy(machine, size)}
        named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
        with transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
            library = tvm_compile(IRModule(named), target=tvm_target(here), tir_pipeline=CPU_CODE).jit()
        self.threads = threads
        self._flops, self._bytes = 2 * _STEPS * sums * width, 2 * 4 * size
        multiply, numbers, result = (
            library["multiply"],
            _array(2 * machine.lanes),
            _array(threads * sums * machine.lanes),
        )
        copy, source, copied = library["copy"], _array(size), _array(size)
        self._multiply = lambda: multiply(numbers, result)
        self._copy = lambda: copy(source, copied)

    def measure(self, rounds: int = 1) -> Ceilings:
        """The best of some rounds of some milliseconds; the caches hold other data then."""
        use_threads(self.threads)
        multiply, copy = _best(self._multiply, rounds), _best(self._copy, rounds)
        return Ceilings(self.threads, self._flops / multiply, self._bytes / copy)


@cache
def measured_ceilings(threads: int) -> Ceilings:
    """Measure this machine; nothing else should be running. The numbers are kept for the life of the process."""
    return Gauge(threads).measure(_ROUNDS)


def _array(size: int) -> Any:
    return ffi().from_dlpack(aligned(np.full(size, 0.5, np.float32)))


def _best(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _multiply(machine: Machine, sums: int) -> Any:
    """In every thread as many independent sums as fill the pipelines, each s = s * a + b."""
    code, lanes = Code(), machine.lanes
    numbers = tirx.decl_buffer((index(2 * lanes),), "float32", "numbers")
    result = tirx.decl_buffer((index(machine.threads * sums * lanes),), "float32", "result")
    whole = vector(0, lanes)
    with code.loop("thread", machine.threads, "parallel") as thread:
        factor, term = (code.let(name, numbers[vector(i * lanes, lanes)]) for i, name in enumerate(("a", "b")))
        totals = [code.local(f"sum_{number}", lanes) for number in range(sums)]
        for total in totals:
            code.store(total, whole, term)
        with code.loop("step", _STEPS):
            for total in totals:
                code.store(total, whole, total[whole] * factor + term)
        for number, total in enumerate(totals):
            code.store(result, vector((thread * sums + number) * lanes, lanes), total[whole])
    return tirx.PrimFunc([numbers, result], code.done())


def _copy(machine: Machine, size: int) -> Any:
    code, lanes = Code(), machine.lanes
    source, result = (tirx.decl_buffer((index(size),), "float32", name) for name in ("source", "result"))
    share = size // machine.threads
    with code.loop("thread", machine.threads, "parallel") as thread, code.loop("step", share // lanes) as step:
        place = vector(code.let("place", thread * share + step * lanes), lanes)
        code.store(result, place, source[place])
    return tirx.PrimFunc([source, result], code.done())
