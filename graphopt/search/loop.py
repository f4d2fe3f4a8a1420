"""The loop of a search: propose, run, measure, record. Imports Optuna: import late."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna import Study
from optuna.trial import FrozenTrial

from graphopt.errors import GraphoptError
from graphopt.pipeline import Pipeline
from graphopt.search.asked import Goals, Searched
from graphopt.search.judge import Found, Judge, Refused
from graphopt.search.proposals import gentle, proposed
from graphopt.search.result import Trial, ranked, trials_of
from graphopt.search.study import enqueue, worker

__all__ = ["Loop", "Progress", "left_out"]

_REPEATS = 40
"""Proposals in a row that bring nothing new, after which the space counts as searched."""
_WORST = 10.0
"""By how much a pipeline without a result misses its constraints, in the eyes of the sampler."""


@dataclass(frozen=True)
class Progress:
    """How far a search is: trials that are done of all that are wanted, what came out last, the best so far."""

    done: int
    wanted: int
    last: Trial | None
    best: Trial | None


@dataclass
class Loop:
    """Runs trials of a study until there are enough.

    Attributes:
        where: options that say where a latency is measured, in pipelines.
        tell: is called after every trial.
    """

    study: Study
    judge: Judge
    passes: Sequence[Searched]
    goals: Goals
    where: Mapping[str, str]
    wanted: int
    tell: Callable[[Progress], None]
    repeats: int = 0
    stopped: str = ""

    def run(self, seconds: float | None) -> str:
        """Try pipelines until there are enough, the time is over or nothing new comes; a trial that has begun is
        finished. An interrupt ends the search as well. Returns why it ended."""
        start = time.monotonic()
        self._enough(None)
        try:
            if not self.stopped:
                self.study.optimize(self._objective, timeout=seconds, callbacks=[self._done])
        except KeyboardInterrupt:
            return "interrupted"
        over = seconds is not None and time.monotonic() - start >= seconds
        return self.stopped or ("the time is over" if over else "ended")

    def _objective(self, trial: optuna.Trial) -> list[float]:
        trial.set_user_attr("worker", worker())
        try:
            found = self._found(trial)
        except Refused as refused:
            self._record(trial, {name: getattr(refused, name) for name in ("reason", "idle", "odd", "again")})
            raise self._pruned(trial, refused.reason) from refused
        except Exception as error:  # a bug in a pass, or no memory: the search goes on, and the reason is kept
            reason = f"{type(error).__name__}: {error}"
            self._record(trial, {"reason": reason})
            raise self._pruned(trial, reason) from error
        self._record(trial, found.to_json())
        measures = {name: float(getattr(found, name)) for name in ("latency", "size", "loss")}
        for name, excess in self.goals.excess(measures).items():
            trial.set_constraint(name, excess)
        return [measures[name] for name in self.goals.objectives]

    def _found(self, trial: optuna.Trial) -> Found:
        text = proposed(trial, self.passes, left_out(trials_of(self.study), self.passes), self.where)
        if not text:
            trial.set_user_attr("same_as", -1)
            raise Refused("no pass is used")
        try:
            pipeline = str(Pipeline.parse(text))
        except GraphoptError as error:
            pipeline, problem = text, error.what
        else:
            problem = ""
        trial.set_user_attr("pipeline", pipeline)
        trials = trials_of(self.study)
        for other in trials:
            # Both write their pipelines before they look at others': of two at once the first one goes on.
            is_running = other.state == "running" and other.number < trial.number
            if other.pipeline == pipeline and other.number != trial.number:
                if other.state in ("complete", "pruned") and not other.again:
                    trial.set_user_attr("same_as", other.number)
                    return _same(other)
                if is_running:
                    trial.set_user_attr("same_as", other.number)
                    raise Refused(f"another process runs it, as trial {other.number}")
        if problem:
            raise Refused(problem, odd=True)
        known = {other.found.structure: other.found for other in trials if other.found}
        return self.judge.judge(pipeline, known)[0]

    def _record(self, trial: optuna.Trial, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if value is not None and value is not False:
                trial.set_user_attr(name, value)

    def _pruned(self, trial: optuna.Trial, reason: str) -> optuna.TrialPruned:
        trial.set_constraint("result", _WORST)
        return optuna.TrialPruned(reason)

    def _done(self, study: Study, frozen: FrozenTrial) -> None:
        is_repeat = "same_as" in frozen.user_attrs
        self.repeats = self.repeats + 1 if is_repeat else 0
        self._enough(None if is_repeat else frozen)
        if self.stopped:
            study.stop()

    def _enough(self, frozen: FrozenTrial | None) -> None:
        trials = trials_of(self.study)
        done = [one for one in trials if one.state in ("complete", "pruned")]
        last = next((one for one in trials if frozen is not None and one.number == frozen.number), None)
        if last is not None and last.state == "pruned":
            self._try_gently(last, trials)
        best = next(iter(ranked(done, self.goals)), None) if self.goals.limits else None
        self.tell(Progress(len(done), self.wanted, last, best))
        if len(done) >= self.wanted:
            self.stopped = "all trials are done"
        elif self.repeats >= _REPEATS:
            self.stopped = f"nothing new came in {_REPEATS} proposals"
        elif len(left_out(trials, self.passes)) == len(self.passes):
            self.stopped = "no pass can do anything for this model"

    def _try_gently(self, last: Trial, trials: Sequence[Trial]) -> None:
        """A pass that cannot reach the goal by itself may still be of use: it gets a second try."""
        one = next((one for one in self.passes if one.name == last.alone), None)
        if one is not None and not last.idle and len(_fruitless(trials, one.name)) == 1:
            enqueue(self.study, gentle(one, self.passes).params, {"alone": one.name})


def _same(other: Trial) -> Found:
    """What a pipeline was found to be before."""
    if other.found is None:
        raise Refused(other.reason or "", idle=other.idle, odd=other.odd)
    return other.found


def _fruitless(trials: Sequence[Trial], name: str) -> list[Trial]:
    return [one for one in trials if one.alone == name and one.state == "pruned" and not (one.odd or one.again)]


def left_out(trials: Sequence[Trial], passes: Sequence[Searched]) -> dict[str, str]:
    """Passes that change nothing of this model, or fail alone both at the goal and gently; with the reasons."""
    found = {}
    for one in passes:
        fruitless = _fruitless(trials, one.name)
        idle = [trial for trial in fruitless if trial.idle]
        if idle or len(fruitless) > 1:
            found[one.name] = (idle or fruitless)[-1].reason or ""
    return found
