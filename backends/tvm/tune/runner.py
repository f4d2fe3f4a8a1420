"""A process that runs candidates and times them; it needs TVM's runtime alone, so that a new one is there at once.

Request and answer are those of `measuring`. Candidates take turns, so that what disturbs the machine disturbs all of
them. Weights are as many as the model has, and come from memory or the last cache as they do there; the other operand
stays where the kernel before would have left it.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from typing import Any

import numpy as np

from graphopt.backends.tvm.runtime import START_THREADS, STOP_THREADS, aligned, ffi

__all__ = ["respond", "timed"]

_FEWEST_ROUNDS, _MOST_ROUNDS = 4, 16
_HOPELESS = 1.2
"""Candidates that take so many times as long as the first are not looked at any longer."""

_SAMPLE = 64
"""Numbers of a result that tell whether two machines compute the same."""

_CALLS = 2
"""Calls of a turn, of which the fastest counts."""

_MOST_WEIGHTS, _MOST_SETS = 96 << 20, 256
"""Bytes of all sets of weights, beyond what the last cache of most machines holds, unless a single one has more; and
how many sets there are at most."""


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what is asked for."""
    try:
        library = ffi().load_module(request["library"])
        return timed(library, request)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def timed(library: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Rounds of all functions of a loaded library."""
    functions = {name: library.get_function(name) for name in request["functions"]}
    sets = _operands(request["arguments"], int(request["weights"]))
    library.get_function(START_THREADS)(int(request["threads"]))
    try:
        errors, sample = _errors(functions, sets[0])
        return {
            "seconds": _rounds(functions, sets, float(request["seconds"])),
            "errors": errors,
            "sample": sample,
        }
    finally:
        library.get_function(STOP_THREADS)()


def _operands(arguments: list[Any], weights: int) -> list[list[Any]]:
    """Sets of equal arguments that share all but the weights, which take up so many bytes together."""
    chance = np.random.default_rng(0)
    first = [_drawn(argument, chance) for argument in arguments]
    stored = [role != "data" for _, _, role in arguments]
    size = sum(array.nbytes for array, own in zip(first, stored, strict=True) if own)
    count = max(1, min(_MOST_SETS, min(weights, _MOST_WEIGHTS) // max(1, size)))
    shared = [ffi().from_dlpack(array) for array in first]
    others = (
        [
            ffi().from_dlpack(_copied(array)) if own else here
            for array, here, own in zip(first, shared, stored, strict=True)
        ]
        for _ in range(count - 1)
    )
    return [shared, *others]


def _copied(array: Any) -> Any:
    room = aligned(np.empty_like(array))
    np.copyto(room, array)
    return room


def _drawn(argument: Any, chance: np.random.Generator) -> Any:
    shape, dtype, role = argument
    floating = np.issubdtype(np.dtype(dtype), np.floating)
    values = chance.standard_normal(shape, np.float32) if floating else np.zeros(shape)
    if role.startswith("quarters of "):
        values = _quarters(chance, shape, int(role.removeprefix("quarters of ")))
    return aligned(np.ascontiguousarray(values.astype(dtype)))


def _quarters(chance: np.random.Generator, shape: list[int], columns: int) -> Any:
    """A random matrix as Strassen's product takes it (`kernels.strassen.quarters`): any seven would not do, as results
    would depend on which rows are paired."""
    pairs, _, short, lanes = shape
    matrix, half = chance.standard_normal((columns, 2 * short), np.float32), pairs * lanes
    left, right = (part.reshape(-1, lanes, 2 * short) for part in (matrix[:half], matrix[columns - half :]))
    (a, c), (b, d) = ((part[..., :short].swapaxes(1, 2), part[..., short:].swapaxes(1, 2)) for part in (left, right))
    return np.stack([a + d, a, b - d, c - a, d, a + b, c + d], axis=1)


def _errors(functions: dict[str, Any], operands: list[Any]) -> tuple[dict[str, float], list[float]]:
    """How far each result is from the first function's, relative to its largest; and some numbers of that one."""
    found: dict[str, float] = {}
    result: Any = np.from_dlpack(operands[-1])
    expected: Any = None
    for name, function in functions.items():
        result.fill(0)
        function(*operands)
        if expected is None:
            expected, largest = result.copy(), float(np.nanmax(np.abs(result), initial=0.0)) or 1.0
            found[name] = 0.0
            continue
        same_nan = np.array_equal(np.isnan(result), np.isnan(expected))
        far = float(np.nanmax(np.abs(result - expected), initial=0.0)) / largest
        found[name] = far if same_nan else math.inf
    flat = np.ravel(expected)
    return found, [float(value) for value in flat[:: max(1, flat.size // _SAMPLE)][:_SAMPLE]]


def _rounds(functions: dict[str, Any], sets: list[list[Any]], seconds: float) -> dict[str, list[float]]:
    chance, start = random.Random(0), time.perf_counter()
    turn = itertools.cycle(sets)  # the one that was used longest ago is the farthest away
    first = next(iter(functions))
    found: dict[str, list[float]] = {name: [] for name in functions}
    hopeful = list(functions)
    for number in range(_MOST_ROUNDS):
        if number >= _FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in chance.sample(hopeful, len(hopeful)):
            function, best = functions[name], math.inf
            function(*next(turn))  # brings its code into the caches
            for _ in range(_CALLS):
                operands = next(turn)
                begin = time.perf_counter()
                function(*operands)
                best = min(best, time.perf_counter() - begin)
            found[name].append(best)
        if number + 1 == _FEWEST_ROUNDS:
            usual = float(np.median(found[first]))
            hopeful = [name for name in hopeful if name == first or np.median(found[name]) < _HOPELESS * usual]
    return found


if __name__ == "__main__":
    from graphopt.backends.tvm.tune.worker import serve

    ffi()
    serve(respond)
    sys.exit(0)
