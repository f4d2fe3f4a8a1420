"""Measuring on this machine."""

from __future__ import annotations

import os

from graphopt.backends.tvm.tune.measuring import Job, Measured, MeasuringFailed
from graphopt.backends.tvm.tune.worker import Worker, WorkerFailed

__all__ = ["BUILDER", "RUNNER", "LocalMeasurer", "divided_cores"]

BUILDER, RUNNER = "graphopt.backends.tvm.tune.builder", "graphopt.backends.tvm.tune.runner"
_SECONDS = 90.0
_MOST_BUILDERS = 8
"""Processes that compile: each takes 500 MB."""


class LocalMeasurer:
    """A process that runs libraries, on cores of its own."""

    def __init__(self, cores: tuple[int, ...], seconds: float = _SECONDS) -> None:
        self.places = 1
        self.runner, self.seconds = Worker(RUNNER, cores), seconds

    def measure(self, job: Job) -> Measured:
        try:
            answer = self.runner.ask(job.to_json(), self.seconds)
        except WorkerFailed as failure:
            raise MeasuringFailed(failure.status, str(failure)) from failure
        if "failed" in answer:
            raise MeasuringFailed("refused", answer["failed"])
        return Measured(answer["seconds"], answer["errors"])

    def close(self) -> None:
        self.runner.stop()


def divided_cores(threads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cores to measure on, and those to compile on: all, of which the former take turns."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return cores[-threads:], cores[:_MOST_BUILDERS]
