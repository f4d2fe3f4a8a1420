"""What a search has found: its trials, their frontier, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.search.asked import MEASURES, Goals
from graphopt.search.judge import Found

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from graphopt.model import Model

__all__ = ["GoalMissed", "Result", "Trial", "frontier", "ranked", "trials_of"]


@dataclass(frozen=True)
class Trial:
    """One pipeline that was tried.

    Attributes:
        number: of Optuna's trial.
        pipeline: its text; `graphopt opt -p` and `graphopt.run` take it.
        state: `complete`, `pruned` (no result, see `reason`), `running`, or `failed` (its process died).
        alone: the pass that it has, where it is one that was tried first of all, to compare with.
        idle, odd, again: of one that was refused: it changes nothing; its options do not go together; it may be tried
            again.
        seconds: that it took.
    """

    number: int
    pipeline: str
    state: str
    found: Found | None = None
    reason: str | None = None
    alone: str | None = None
    idle: bool = False
    odd: bool = False
    again: bool = False
    seconds: float | None = None

    def measure(self, name: str) -> float:
        """The latency, size or loss of a trial that is complete."""
        assert self.found is not None
        return float(getattr(self.found, name))

    @property
    def measures(self) -> dict[str, float]:
        return {name: self.measure(name) for name in MEASURES}

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"found": self.found.to_json() if self.found else None}


@dataclass(frozen=True)
class Result:
    """What a search has found.

    Attributes:
        goals: limits by measure; empty where there were none.
        trials: all that are in the study, equal pipelines once.
        left_out: passes that turned out to do nothing for this model, with the reasons.
        best: the trial that keeps the goals and is the best by what has no goal; None without goals.
        verified: what `best` was measured to be when it was run again; `rejected` are better ones that were not what
            they had been.
        model: what the pipeline of `best` makes of the model.
        stopped: why the search ended.
    """

    goals: Mapping[str, float]
    trials: tuple[Trial, ...]
    left_out: Mapping[str, str]
    stopped: str
    best: Trial | None = None
    verified: Found | None = None
    rejected: Mapping[int, str] | None = None
    model: Model | None = None

    @property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def frontier(self) -> list[Trial]:
        """Trials that no other one is at least as good as in latency, size and loss; by latency."""
        return frontier(self.complete)

    def to_json(self) -> dict[str, Any]:
        return {
            "goals": dict(self.goals),
            "stopped": self.stopped,
            "left_out": dict(self.left_out),
            "best": self.best and self.best.to_json(),
            "verified": self.verified and self.verified.to_json(),
            "rejected": {str(number): why for number, why in (self.rejected or {}).items()},
            "frontier": [trial.number for trial in self.frontier],
            "trials": [trial.to_json() for trial in self.trials],
        }


class GoalMissed(GraphoptError):
    """No pipeline keeps the goals. `result` holds what was tried."""

    def __init__(self, what: str, result: Result, *, why: str | None = None, todo: str | None = None) -> None:
        super().__init__(what, why=why, todo=todo)
        self.result = result


def frontier(trials: Sequence[Trial], names: Sequence[str] = MEASURES) -> list[Trial]:
    """Trials that no other one is at least as good as in all these measures, and better in one; equal ones once."""
    kept: list[tuple[tuple[float, ...], Trial]] = []
    for trial in sorted(trials, key=lambda one: (*(one.measure(name) for name in names), one.number)):
        point = tuple(trial.measure(name) for name in names)
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other, _ in kept):
            kept.append((point, trial))
    return [trial for _, trial in kept]


def ranked(trials: Sequence[Trial], goals: Goals) -> list[Trial]:
    """Complete trials that keep the goals, the best first."""
    (objective, *_) = goals.objectives
    kept = [one for one in trials if one.found and max(goals.excess(one.measures).values(), default=0.0) <= 0]
    return sorted(kept, key=lambda one: (one.measure(objective), *one.measures.values(), one.number))


def trials_of(study: Study) -> list[Trial]:
    """The trials of a study, without those that are queued and those that repeat others."""
    found = [_trial(one) for one in study.get_trials(deepcopy=False) if "same_as" not in one.user_attrs]
    return [one for one in found if one.pipeline]


def _trial(one: FrozenTrial) -> Trial:
    attrs = one.user_attrs
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(one.state.name, "running")
    names = [field.name for field in fields(Found)]
    found = Found(**{name: attrs[name] for name in names}) if state == "complete" else None
    return Trial(
        one.number,
        attrs.get("pipeline", ""),
        state,
        found,
        attrs.get("reason"),
        attrs.get("alone"),
        bool(attrs.get("idle")),
        bool(attrs.get("odd")),
        bool(attrs.get("again")),
        one.duration.total_seconds() if one.duration else None,
    )
