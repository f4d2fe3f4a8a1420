"""The time of one call of either model, compiled by one backend, measured in turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graphopt.backend import Timing, build
from graphopt.model import Model
from graphopt.sample import usual_inputs

__all__ = ["LatencyDiff", "measure_both"]


@dataclass(frozen=True, slots=True)
class LatencyDiff:
    """Seconds per call of both models; `ratio` is the second over the first."""

    backend: str
    a: Timing
    b: Timing

    @property
    def ratio(self) -> float:
        return self.b.median / self.a.median if self.a.median else 1.0

    def to_json(self) -> dict[str, Any]:
        return {"backend": self.backend, "a": asdict(self.a), "b": asdict(self.b), "ratio": self.ratio}


def measure_both(a: Model, b: Model, backend: str, *, rounds: int = 20) -> LatencyDiff:
    """Compile both for this machine and time them round by round in turn, so that both see the same disturbances.

    Raises:
        UsageError: there is no such backend.
        UnsupportedError: the backend cannot run one of them.
    """
    calls = []
    for model in (a, b):
        artifact, tensors = build(model, backend=backend), usual_inputs(model)
        artifact.run(tensors)
        calls.append((artifact, tensors))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for row, (artifact, tensors) in zip(times, calls, strict=True):
            row.append(Timing.measure(lambda one=artifact, x=tensors: one.run(x), rounds=1, warmup=1).median)  # type: ignore[misc]  # mypy cannot type a lambda with a default
    return LatencyDiff(backend, *(_timing(row) for row in times))


def _timing(times: list[float]) -> Timing:
    import statistics

    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, q1, q3, len(times))
