"""Searching over pipelines: which passes, in which order, with which options.

found = graphopt.search(model, calib=batches, goals={"latency": 0.5}, trials=60)
print(found.best.pipeline)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.sample import check_batch
from graphopt.search.asked import Goals, Searched, describe, parse_goals, parse_passes, usual_passes
from graphopt.search.judge import Batches, Judge
from graphopt.search.proposals import baselines
from graphopt.search.result import GoalMissed, Result, Trial, frontier, ranked, trials_of
from graphopt.search.study import open_study, recover, require_optuna, storage_errors
from graphopt.search.verified import verified
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.search.loop import Progress

__all__ = ["GoalMissed", "Result", "Trial", "check_request", "frontier", "search"]

_FORMAT = 1
"""Of what a study holds."""
_RANDOM = 8
"""Trials at random, behind the first ones, before the results are made use of."""


def search(
    model: Model,
    target: str = "cpu",
    *,
    calib: Iterable[Sequence[torch.Tensor]],
    valid: Iterable[Sequence[torch.Tensor]] | None = None,
    evaluate: Callable[[Model], float] | None = None,
    goals: Mapping[str, float] | None = None,
    passes: str | None = None,
    trials: int = 50,
    seconds: float | None = None,
    storage: str | None = None,
    study: str = "search",
    seed: int = 0,
    threads: int | None = None,
    backend: str = "tvm",
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Try pipelines and measure what each makes of the model: its latency and size, as parts of the original's, both
    compiled after `exact`, and its loss.

    The first trials are each pass alone at the goal. With goals one measure is made small within them, and the best
    result is run and measured once more before it is given out; without goals the whole frontier is of interest.

    Args:
        target: a preset of `graphopt targets`, or a JSON file; this machine has to be able to run its code.
        calib: batches of flat tensor inputs that passes calibrate with.
        valid: such batches that the loss is measured on; by default the same ones.
        evaluate: a loss of your own, the less the better; by default the root of the mean square of the outputs'
            differences from the original's, relative to these.
        goals: limits for `latency`, `size` and `loss`, such as `{"latency": 0.5}`.
        passes: what is tried, such as `prune-channels{macs=0.3..0.9,importance=taylor|fisher},low-rank`; by default
            every pass that declares what to try of it.
        trials: how many there are to be in the study, those from before and of other processes included.
        seconds: after which no new trial begins.
        storage: the address of a database, such as `sqlite:///study.db`, in which trials are kept; a search with the
            same storage and `study` goes on where another one is or was. In memory by default.
        seed: of what is tried; the same seed with the same measurements tries the same.
        threads: threads that latencies are measured with; the target's cores by default.
        tell: is told how far the search is, after every trial.

    Raises:
        UsageError: for wrong arguments, missing data, a missing Optuna, or a storage that holds something else.
        GoalMissed: when no pipeline keeps the goals; it says which one is the nearest, and has the result.
    """
    asked, limits = check_request(passes, goals or {}, target, trials)
    data, judged = _checked(model, calib, valid)
    watch = Stopwatch(Target.parse(target), threads, backend)
    first = baselines(asked, limits, max(len(asked), trials // 3))
    from graphopt.search.loop import Loop, left_out
    from graphopt.search.sampler import SeededSampler

    identity = _identity(model, data, judged, watch, limits, asked, evaluate)
    sampler = SeededSampler(seed, len(first) + _RANDOM)
    kept = open_study(storage, study, len(limits.objectives), identity, first, sampler)
    where = {"target": target} | ({"threads": str(threads)} if threads is not None else {})
    judge = Judge(model, watch, data, judged, evaluate)
    loop = Loop(kept, judge, asked, limits, where, trials, tell)
    with storage_errors(storage):
        recover(kept)
        stopped = loop.run(seconds)
        found = trials_of(kept)
    result = Result(limits.limits, tuple(found), left_out(found, asked), stopped)
    return _finished(result, limits, judge) if limits.limits else result


def _checked(
    model: Model, calib: Iterable[Sequence[torch.Tensor]], valid: Iterable[Sequence[torch.Tensor]] | None
) -> tuple[Batches, Batches]:
    """The batches that passes calibrate with, and those that the loss is measured on.

    Raises:
        UsageError: there are none, or one does not fit the model.
    """
    data = [tuple(batch) for batch in calib]
    judged = data if valid is None else [tuple(batch) for batch in valid]
    if not data or not judged:
        raise UsageError(
            "a search needs calibration data", why="passes calibrate with them, and the loss is measured on them"
        )
    for kind, batches in (("calibration", data), ("validation", judged)):
        for number, batch in enumerate(batches):
            check_batch(model.signature, batch, where=f"{kind} batch {number}")
    return data, judged


def check_request(
    passes: str | None, goals: Mapping[str, float], target: str, trials: int
) -> tuple[list[Searched], Goals]:
    """What is searched for, and Optuna's being there, checked before anything is read.

    Raises:
        UsageError: for unknown passes, options and goals, or numbers that are none.
    """
    require_optuna()
    if trials < 1:
        raise UsageError(f"{trials} trials are none", todo="give a number from 1 on")
    if any(mark in target for mark in "{},"):
        raise UsageError(
            f"the target '{target}' cannot be written in a pipeline", todo="give a preset or the path of a JSON file"
        )
    Target.parse(target)
    limits = parse_goals(goals)
    return usual_passes() if passes is None else parse_passes(passes), limits


def _finished(result: Result, goals: Goals, judge: Judge) -> Result:
    """The result with the best trial, run again.

    Raises:
        GoalMissed: when there is none.
    """
    kept = ranked(result.complete, goals)
    if not kept:
        raise _missed(result, goals)
    best, found, small, rejected = verified(kept, goals, judge)
    result = replace(result, rejected=rejected)
    if best is None:
        raise GoalMissed(
            f"no result could be verified: {len(rejected)} that kept {goals} did not when they were run again",
            result,
            why="\n".join(f"trial {number}: {why}" for number, why in rejected.items()),
            todo="search on with the same storage while nothing else is running",
        )
    return replace(result, best=best, verified=found, model=small)


def _missed(result: Result, goals: Goals) -> GoalMissed:
    if not result.complete:
        reasons = [f"trial {one.number}, {one.pipeline}: {one.reason}" for one in result.trials if one.reason][:5]
        return GoalMissed(
            f"none of {len(result.trials)} trials has a result",
            result,
            why="\n".join(reasons) or None,
            todo="name other passes, or wider ranges, with --passes (passes=)",
        )
    nearest = min(result.complete, key=lambda one: (max(goals.excess(one.measures).values()), one.number))
    reached = ", ".join(f"{name} {nearest.measure(name):.3g}" for name in goals.limits)
    return GoalMissed(
        f"the goal {goals} was reached by none of {len(result.complete)} pipelines",
        result,
        why=f"the nearest is trial {nearest.number} with {reached}: {nearest.pipeline}",
        todo="search on with more trials and the same storage, ask for less, or give wider ranges (--passes, passes=)",
    )


def _identity(
    model: Model,
    calib: Batches,
    valid: Batches,
    watch: Stopwatch,
    goals: Goals,
    passes: Sequence[Searched],
    evaluate: Callable[[Model], float] | None,
) -> dict[str, Any]:
    """Everything that trials of one study have to agree on."""
    own = f"{evaluate.__module__}:{evaluate.__qualname__}" if evaluate else "error of the outputs"
    return {
        "format": _FORMAT,
        "model": _digest(str(model), list(model.params.values())),
        "calibration data": _digest("", [tensor for batch in calib for tensor in batch]),
        "validation data": _digest("", [tensor for batch in valid for tensor in batch]),
        "loss": own,
        "target": watch.target.to_json(),
        "threads": watch.threads or watch.target.cores,
        "backend": watch.backend,
        "goals": str(goals) or "none",
        "passes": describe(passes),
    }


def _digest(text: str, tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Callable(ModuleType):
    """`graphopt.search` is this package once it is imported, whatever it was before, and is called as the function."""

    __call__ = staticmethod(search)


sys.modules[__name__].__class__ = _Callable
