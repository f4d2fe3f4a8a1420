"""Candidates of one task on their way: compiled together, measured in turns, judged.

A candidate that ends its process or hangs takes those with it that share its library; they are then tried one by one.
"""

from __future__ import annotations

import itertools
import math
import queue
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices
from graphopt.backends.tvm.tune.database import Row
from graphopt.backends.tvm.tune.measuring import Job, Measured, Measurer, MeasuringFailed, ratios
from graphopt.backends.tvm.tune.tasks import Task
from graphopt.backends.tvm.tune.worker import Worker, WorkerFailed

__all__ = ["TOLERANCE", "Batch", "Bench"]

TOLERANCE = 1e-5
"""How far a candidate may be from what the rules choose, relative to the largest number: the order of sums differs."""

_NOISY = 0.03
"""How far the median of the ratios may be off by chance (half the distance between their quartiles over the root of
their number); more says nothing, but of those that are slower in any case."""

_BUILD_SECONDS, _SINGLE_SECONDS = 120.0, 40.0
_ROUND_SECONDS = 1.0


@dataclass(frozen=True)
class Batch:
    """Candidates of a task; the first is what the rules choose. The name is that of the database for it."""

    task: Task
    candidates: tuple[Choices, ...]
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class _Library:
    path: Path
    names: dict[Choices, str]


class Bench:
    """Builders, a measurer, and a folder for libraries.

    Args:
        where: the target as JSON text, threads, exact.
        cores: those that are measured on; builders on one of them stop meanwhile.
        weights: bytes of the model's weights.
    """

    def __init__(
        self,
        where: tuple[str, int, bool],
        builders: Sequence[Worker],
        measurer: Measurer,
        cores: Collection[int] = (),
        weights: int = 0,
    ) -> None:
        self.weights = weights
        self.where, self.builders, self.measurer = where, list(builders), measurer
        self._in_the_way = [builder for builder in builders if set(builder.cores) & set(cores)]
        self._free: queue.Queue[Worker] = queue.Queue()
        for builder in builders:
            self._free.put(builder)
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-tune-")
        self._numbers = itertools.count()
        self._ending = False
        self._places = threading.Semaphore(measurer.places)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def flights(self) -> int:
        """How many batches can be on their way at once: some that are compiled, others that are measured."""
        return len(self.builders) + self.measurer.places

    def stop(self) -> None:
        """End builders and measurer at once, whatever they do; what they were at comes to nothing."""
        self._ending = True
        for builder in self.builders:
            builder.stop()
        self.measurer.close()

    def rows(self, batch: Batch) -> list[Row]:
        """Compile and measure a batch. Several threads may; each waits until there is a builder, and then a place."""
        library, rows = self.build(batch)
        if library is not None and not self._ending:
            with self._places:
                rows += self.measure(batch, library)
        return [] if self._ending else rows

    def build(self, batch: Batch) -> tuple[_Library | None, list[Row]]:
        """Compile a batch; returns the library, and rows for candidates that cannot be compiled. Takes a builder."""
        builder = self._free.get()
        try:
            return self._built(builder, batch, _BUILD_SECONDS)
        except WorkerFailed as failure:
            if self._ending:
                return None, []
            if len(batch.candidates) == 1:
                return None, [Row(batch.task.key, batch.candidates[0], failure.status, why=str(failure))]
            return self._one_by_one(builder, batch)
        finally:
            self._free.put(builder)

    def _built(self, builder: Worker, batch: Batch, seconds: float) -> tuple[_Library, list[Row]]:
        path = Path(self._folder.name) / f"{next(self._numbers)}.so"
        target, threads, exact = self.where
        request = {
            "function": batch.task.function,
            "candidates": [choices.to_json() for choices in batch.candidates],
            "target": target,
            "threads": threads,
            "exact": exact,
            "library": str(path),
        }
        answer = builder.ask(request, seconds)
        if "failed" in answer:
            raise WorkerFailed("refused", answer["failed"])
        found, refused = dict[Choices, str](), list[Row]()
        for choices, name, why in zip(batch.candidates, answer["names"], answer["errors"], strict=True):
            if name is None:
                refused.append(Row(batch.task.key, choices, "refused", why=why))
            else:
                found[choices] = name
        return _Library(path, found), refused

    def _one_by_one(self, builder: Worker, batch: Batch) -> tuple[_Library | None, list[Row]]:
        """The library of those that can be compiled by themselves, and rows for the others."""
        sound, rows = list[Choices](), list[Row]()
        for choices in batch.candidates:
            try:
                library, refused = self._built(builder, Batch(batch.task, (choices,)), _SINGLE_SECONDS)
                library.path.unlink(missing_ok=True)
            except WorkerFailed as failure:
                refused = [Row(batch.task.key, choices, failure.status, why=str(failure))]
            rows += refused
            if not refused:
                sound.append(choices)
        if not sound or sound[0] != batch.candidates[0]:
            return None, rows
        library, refused = self._built(builder, Batch(batch.task, tuple(sound)), _BUILD_SECONDS)
        return library, rows + refused

    def measure(self, batch: Batch, library: _Library) -> list[Row]:
        """Time and judge what was compiled; what the rules choose comes first."""
        names = library.names
        reference = names.get(batch.candidates[0])
        if reference is None:
            return []
        unique = tuple(dict.fromkeys([reference, *names.values()]))
        with self._alone():
            try:
                measured = self.measurer.measure(self._job(batch, library, unique))
            except MeasuringFailed:
                if self._ending:
                    return []
                return self._each_alone(batch, library, reference)
            finally:
                library.path.unlink(missing_ok=True)
        return [_judged(batch.task.key, choices, measured, reference, name) for choices, name in names.items()]

    def _job(self, batch: Batch, library: _Library, names: tuple[str, ...]) -> Job:
        task, threads = batch.task, self.where[1]
        return Job(library.path, task.key, names, task.arguments, threads, _ROUND_SECONDS, self.weights)

    def _each_alone(self, batch: Batch, library: _Library, reference: str) -> list[Row]:
        rows = []
        for choices, name in library.names.items():
            names = (reference,) if name == reference else (reference, name)
            try:
                measured = self.measurer.measure(self._job(batch, library, names))
                rows.append(_judged(batch.task.key, choices, measured, reference, name))
            except MeasuringFailed as failure:
                rows.append(Row(batch.task.key, choices, failure.status, why=str(failure)))
        return rows

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Builders stop meanwhile where they would take cores from what is measured."""
        for builder in self._in_the_way:
            builder.pause(True)
        try:
            yield
        finally:
            for builder in self._in_the_way:
                builder.pause(False)


def _judged(task: str, choices: Choices, measured: Measured, reference: str, name: str) -> Row:
    error = measured.errors[name]
    if not error <= TOLERANCE:
        return Row(task, choices, "wrong", why=f"its result is {error:.1e} of the largest off")
    seconds = min(measured.seconds[name])
    if choices == RULES_CHOOSE:
        return Row(task, choices, "ok", 1.0, seconds)
    ratio, spread = ratios(measured, reference, name)
    chance = spread / math.sqrt(len(measured.seconds[name]))
    if chance > _NOISY and ratio - 2 * chance < 1:
        return Row(task, choices, "noisy", ratio, seconds, f"the ratio is {chance:.0%} off by chance")
    return Row(task, choices, "ok", ratio, seconds)
