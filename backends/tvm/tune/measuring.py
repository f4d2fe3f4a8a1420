"""What is asked of whoever measures candidates, and what it answers; the same for this machine and for others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

__all__ = ["Failure", "Job", "Measured", "Measurer", "MeasuringFailed", "ratios"]

Argument = tuple[Sequence[int], str, str]
"""Shape, dtype and role: `data` (the result last), `weight`, which comes from memory, `quarters of COLUMNS`, a weight
as Strassen's product takes it."""


Failure = Literal["crash", "timeout", "refused"]


class MeasuringFailed(Exception):
    """A library ended its process (`crash`), hung (`timeout`), or could not be run (`refused`)."""

    def __init__(self, status: Failure, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Job:
    """Functions of a library that compute the same.

    Attributes:
        task: the key of what they compute.
        functions: of which the first is the one that the others are compared with.
        seconds: after which no further round begins.
        weights: bytes of them in the model, which come between two calls with the same ones.
    """

    library: Path
    task: str
    functions: tuple[str, ...]
    arguments: tuple[Argument, ...]
    threads: int
    seconds: float
    weights: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "library": str(self.library),
            "task": self.task,
            "functions": list(self.functions),
            "arguments": [list(argument) for argument in self.arguments],
            "threads": self.threads,
            "seconds": self.seconds,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class Measured:
    """Seconds of every round, and how far results are from the first function's, relative to the largest of them."""

    seconds: Mapping[str, Sequence[float]]
    errors: Mapping[str, float]


class Measurer(Protocol):
    """Runs the functions of a job in turns.

    Attributes:
        places: how many jobs it can do at once.
    """

    places: int

    def measure(self, job: Job) -> Measured:
        """Time a job.

        Raises:
            MeasuringFailed: when a function crashes or hangs, or the place where it ran is lost.
        """

    def close(self) -> None:
        """End what was started."""


def ratios(measured: Measured, first: str, name: str) -> tuple[float, float]:
    """The median over the rounds of a function's time over the first one's, and half the distance of its quartiles."""
    pairs = zip(measured.seconds[name], measured.seconds[first], strict=False)
    found = [own / other for own, other in pairs]
    if len(found) < 2:
        return found[0], 0.0
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return middle, (high - low) / 2
