"""One case of the latency benchmark, in a process that does nothing else: a model, a batch size, a number of threads.

    python -m benchmarks.latency_case CASE.json RESULT.json    (`python -m benchmarks.latency` runs this)

Every engine makes the model ready once and is checked against eager PyTorch. Then all take turns, round by round in an
order drawn anew: a pause, in which threads of the engine before stop to spin; a call that wakes its threads, which is
kept apart; the calls that count.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.latency_engines import ENGINES, Built, Engine, tensors_of
from benchmarks.latency_models import Subject, build
from graphopt.check import relative_error

__all__ = ["Case", "measure", "timing"]

CALLS = 5
"""Timed calls of a turn; fewer where they take long."""
TURN_SECONDS = 0.3
PAUSE_SECONDS = 0.1
FEWEST_ROUNDS, ENOUGH_SECONDS = 5, 180
"""Rounds end early, but not before the fewest, when they have taken this long: large models on one thread do."""


@dataclass(frozen=True)
class Case:
    """What to measure."""

    model: str
    batch: int
    threads: int
    rounds: int
    engines: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.model} batch {self.batch} threads {self.threads}"


def measure(
    case: Case, subject: Subject, engines: Mapping[str, Engine], pause: float = PAUSE_SECONDS
) -> dict[str, Any]:
    """Make the model ready in every engine of the case, and time them in turn. An engine that fails says why."""
    torch.set_num_threads(case.threads)
    ready: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="graphopt-latency-") as folder:
        exported = _Exported(subject, Path(folder))
        built = _build_all(case, subject, engines, exported, found)
        reference = _reference(subject)
        for name, engine in built.items():
            try:
                found[name]["error"] = _error(engine.call(), reference)
            except Exception as failure:
                found[name] = {"failed": _text(failure)}
            else:
                ready[name] = engine.call
        samples, rounds = take_turns(ready, case.rounds, pause)
    for name, taken in samples.items():
        found[name] |= timing(taken.steady) | {"after_pause_ms": round(statistics.median(taken.first) * 1000, 4)}
    facts = {"rounds": rounds, "onnx_export_seconds": round(exported.seconds, 2), "load": _load()}
    return asdict(case) | facts | {"engines": found}


def _load() -> list[float]:
    return [round(load, 1) for load in os.getloadavg()]


class _Exported:
    """The ONNX file of a model, written when first asked for; what went wrong then goes wrong again."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder
        self.seconds = 0.0
        self._outcome: Path | Exception | None = None

    def __call__(self) -> Path:
        if self._outcome is None:
            start = time.perf_counter()
            try:
                self._outcome = self.subject.write_onnx(self.folder)
            except Exception as failure:
                self._outcome = failure
            self.seconds = time.perf_counter() - start
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def _build_all(
    case: Case,
    subject: Subject,
    engines: Mapping[str, Engine],
    exported: _Exported,
    found: dict[str, dict[str, Any]],
) -> dict[str, Built]:
    """The engines that could be made ready, each with its first call behind it. The export is nobody's time."""
    built = {}
    for name in case.engines:
        print(f"{case.key}: {name}", file=sys.stderr, flush=True)
        before, start = exported.seconds, time.perf_counter()
        try:
            engine = engines[name](subject, case.threads, exported)
            engine.call()
        except Exception as failure:
            found[name] = {"failed": _text(failure)}
            continue
        seconds = time.perf_counter() - start - (exported.seconds - before)
        found[name] = {"ready_seconds": round(seconds, 2), **engine.facts}
        built[name] = engine
    return built


def _reference(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_of(subject.module(*subject.args))]


def _error(result: Any, reference: Sequence[Tensor]) -> float | None:
    """Largest error relative to the largest output; None, JSON's way, where it is not finite."""
    outputs = tensors_of(result)
    if len(outputs) != len(reference):
        raise ValueError(f"{len(outputs)} outputs instead of {len(reference)}")
    error = max(relative_error(ours, theirs) for ours, theirs in zip(outputs, reference, strict=True))
    return error if math.isfinite(error) else None


def _text(failure: BaseException) -> str:
    """What went wrong, in a line, files without the folders they are in."""
    text = f"{type(failure).__name__}: {failure}"
    return " ".join(re.sub(r"(?<!\w)(?:/[\w.+@~-]+)+/", "", text).split())[:500]


@dataclass(frozen=True)
class Samples:
    """Seconds of the calls of an engine: the first of every turn, after a pause, and those behind it."""

    first: list[float]
    steady: list[float]


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, pause: float) -> tuple[dict[str, Samples], int]:
    """The samples of every engine, and how many rounds there were."""
    samples = {name: Samples([], []) for name in calls}
    order, shuffler, done = list(calls), random.Random(0), 0
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while done < rounds and (done < FEWEST_ROUNDS or time.perf_counter() - start < ENOUGH_SECONDS):
            shuffler.shuffle(order)
            for name in order:
                time.sleep(pause)
                _turn(calls[name], samples[name])
            done += 1
    finally:
        gc.enable()
    return samples, done


def _turn(call: Callable[[], Any], samples: Samples) -> None:
    samples.first.append(_seconds(call))
    times: list[float] = []
    while len(times) < CALLS and sum(times) < TURN_SECONDS:
        times.append(_seconds(call))
    samples.steady.extend(times)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timing(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the least, in milliseconds."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    ms = {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "min_ms": min(times)}
    return {name: round(seconds * 1000, 4) for name, seconds in ms.items()} | {"samples": len(times)}


def main(arguments: Sequence[str]) -> int:
    """Measure the case in the first file, write the second."""
    given = json.loads(Path(arguments[0]).read_text())
    case = Case(**{**given, "engines": tuple(given["engines"])})
    torch.set_num_threads(case.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other software; what fails is recorded
        try:
            result = measure(case, build(case.model, case.batch), ENGINES)
        except Exception as failure:
            result = asdict(case) | {"failed": _text(failure)}
    Path(arguments[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
