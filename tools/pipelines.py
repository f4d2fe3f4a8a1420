"""Running a pipeline for a command: progress while it runs, its reports folded by pass. Imports torch: import late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.analysis.cost import Cost
from graphopt.errors import UsageError
from graphopt.instruments import Instrument
from graphopt.model import Model
from graphopt.pipeline import Pipeline
from graphopt.tools.console import working
from graphopt.transform import Check, Edit, Miss, Pass, Report

__all__ = ["PassSummary", "apply", "parse", "report_to_json", "summarize", "totals"]


def parse(text: str) -> Pipeline:
    """Read a pipeline, an empty one refused.

    Raises:
        UsageError: naming every unknown pass and option.
    """
    if not text.strip():
        raise UsageError(
            "the pipeline is empty",
            todo="name passes, such as -p fold-batch-norm,dead-code; `graphopt passes` lists them",
        )
    return Pipeline.parse(text)


def apply(
    model: Model,
    pipeline: Pipeline,
    *,
    check: bool = True,
    calib: Sequence[Sequence[torch.Tensor]] = (),
    instruments: Sequence[Instrument] = (),
    limit: int | None = None,
    repro: Path | None = None,
) -> tuple[Model, list[Report]]:
    """`graphopt.run` with progress; the arguments and errors are the same."""
    from graphopt.pipeline import run

    with working(f"running {pipeline}") as tell:
        observers = [_Follow(tell), *instruments]
        return run(model, pipeline, check=check, calib=calib, instruments=observers, limit=limit, repro=repro)


@dataclass
class _Follow(Instrument):
    """Tell which pass is running."""

    tell: Callable[[str], None]

    def before(self, step: Pass, model: Model) -> None:
        self.tell(f"running {step}")


@dataclass(frozen=True)
class PassSummary:
    """All runs of one pass in a pipeline together.

    `misses` holds every miss once, however often the pass came by; `check` is the worst of its checks.
    """

    text: str
    runs: int
    edits: tuple[Edit, ...]
    misses: tuple[Miss, ...]
    seconds: float
    check: Check | None


def summarize(reports: Sequence[Report]) -> list[PassSummary]:
    """The reports by pass, in the order in which each first ran."""
    by_text: dict[str, list[Report]] = {}
    for report in reports:
        by_text.setdefault(report.text, []).append(report)
    return [_summary(text, runs) for text, runs in by_text.items()]


def _summary(text: str, runs: list[Report]) -> PassSummary:
    checks = [run.check for run in runs if run.check is not None]
    return PassSummary(
        text,
        len(runs),
        tuple(edit for run in runs for edit in run.edits),
        tuple(dict.fromkeys(miss for run in runs for miss in run.misses)),
        sum(run.seconds for run in runs),
        max(checks, key=lambda check: check.error, default=None),
    )


def report_to_json(report: Report) -> dict[str, Any]:
    """A report as plain data, its costs cut down to their totals."""
    return report.to_json() | {
        "cost_before": totals(report.cost_before) if report.cost_before else None,
        "cost_after": totals(report.cost_after) if report.cost_after else None,
    }


def totals(cost: Cost) -> dict[str, Any]:
    """The sums of a cost: everything but its rows by node and by module."""
    return {name: value for name, value in cost.to_json().items() if name not in ("nodes", "modules")}
