"""The best result once more: its pipeline is run, checked and measured again before it is given out."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.model import Model
from graphopt.search.asked import Goals
from graphopt.search.judge import Found, Judge, Refused
from graphopt.search.result import Trial

__all__ = ["verified"]

_SLACK = {"latency": 0.02, "size": 1e-6, "loss": 0.02}
"""What measures may differ by, relative to what they were, or to a limit: what measurements that agree may."""
_TRIES = 5


def verified(
    trials: Sequence[Trial], goals: Goals, judge: Judge
) -> tuple[Trial | None, Found | None, Model | None, dict[int, str]]:
    """The first trial that is again what it was, what it was measured to be, its model, and why better ones were
    rejected. A few are tried."""
    rejected: dict[int, str] = {}
    for trial in trials[:_TRIES]:
        try:
            found, small = judge.judge(trial.pipeline, check=True)
        except Refused as refused:
            rejected[trial.number] = refused.reason
            continue
        problem = _problem(trial, found, goals)
        if problem is None:
            return trial, found, small, rejected
        rejected[trial.number] = problem
    return None, None, None, rejected


def _problem(trial: Trial, found: Found, goals: Goals) -> str | None:
    measures = {name: float(getattr(found, name)) for name in _SLACK}
    for name, limit in goals.limits.items():
        if measures[name] > limit * (1 + _SLACK[name]):
            return f"{name} {measures[name]:.3g} is above {limit:g}"
    for name, slack in _SLACK.items():
        before = trial.measure(name)
        if name not in goals.limits and measures[name] > before * (1 + slack) + 1e-9:
            return f"{name} was {before:.4g} and is {measures[name]:.4g}"
    return None
