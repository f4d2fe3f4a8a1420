"""Where the time of a compiled model goes, function by function."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.backend import Timing
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.backends.tvm.artifact import TvmArtifact

__all__ = ["RUNTIME", "Kernel", "Profile", "profile"]

RUNTIME = "(memory and shapes)"
"""Stands for what happens between the kernels: the time of a whole run less theirs. Watching it would slow it down."""


@dataclass(frozen=True)
class Kernel:
    """A function of the compiled model (or `RUNTIME`), over all its calls in one run.

    Attributes:
        seconds: median of the runs, with some microseconds of each call for the measurement itself.
        fastest: the least of the runs, which other processes disturbed least.
        flops, bytes: what it computes and moves (see `work`); None where that is unknown.
    """

    name: str
    calls: int
    seconds: float
    flops: int | None
    bytes: int | None
    fastest: float = 0.0


@dataclass(frozen=True)
class Profile:
    """The kernels of a model, the slowest first, and the time of whole runs without measurement inside."""

    kernels: tuple[Kernel, ...]
    timing: Timing


class _Watch:
    """Is called by the virtual machine before and after every function."""

    def __init__(self, artifact: TvmArtifact) -> None:
        assert artifact.built is not None
        self._work = artifact.built.work
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.calls: dict[str, int] = {}
        self.amounts: dict[str, tuple[int, int] | None] = {}
        self._start = 0.0
        self._now: dict[str, list[float]] = defaultdict(list)

    def __call__(self, _function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> int:
        if before:
            if name in self._work and not self.calls:  # in the first run only, outside of the time that is taken
                self._count(name, arguments)
            self._start = time.perf_counter()
        else:
            passed = time.perf_counter() - self._start
            if name in self._work:
                self._now[name].append(passed)
        return 0  # go on

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Add the work of one more call."""
        more, so_far = self._work[name].at(arguments), self.amounts.get(name, (0, 0))
        self.amounts[name] = (more[0] + so_far[0], more[1] + so_far[1]) if more and so_far else None

    def run_ends(self) -> None:
        for name, times in self._now.items():
            self.seconds[name].append(sum(times))
        self.calls = self.calls or {name: len(times) for name, times in self._now.items()}
        self._now.clear()


def profile(artifact: TvmArtifact, tensors: list[Any], *, rounds: int = 20, warmup: int = 3) -> Profile:
    """Time a model on these inputs as a whole, and then function by function.

    Raises:
        UsageError: for an artifact that was loaded from a folder, which does not tell what its functions compute.
    """
    if artifact.built is None:
        raise UsageError("this artifact was loaded from a folder", todo="build the model again to look into it")
    timing = Timing.measure(lambda: artifact.run(tensors), rounds=rounds, warmup=warmup)
    watch = _Watch(artifact)
    with artifact.watched(watch):
        for _ in range(rounds):
            artifact.run(tensors)
            watch.run_ends()
    kernels = []
    for name, seconds in watch.seconds.items():
        flops, moved = watch.amounts.get(name) or (None, None)
        kernels.append(Kernel(name, watch.calls[name], statistics.median(seconds), flops, moved, min(seconds)))
    between = max(0.0, timing.median - sum(kernel.seconds for kernel in kernels))
    kernels.append(Kernel(RUNTIME, 0, between, None, None))
    return Profile(tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)), timing)
