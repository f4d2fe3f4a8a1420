"""The last word: a model as a whole, tuned and untuned, in turns.

Choices that were best by themselves are looked at where they are used. Those that take longer there are dropped; if
what is left does not make the model faster, all are. Either is remembered. A gain within the noise is not taken.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.kernels.choices import Tuned
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.profile import profile
from graphopt.backends.tvm.tune.database import Outcome
from graphopt.backends.tvm.tune.tasks import Tasks

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.target import Target

__all__ = ["in_turns", "settled"]

_TOLERANCE = 1e-4
"""How far a tuned model may be from the untuned one, relative to the largest output: algorithms round differently."""

_WORTH = 0.99
"""What is gained less surely than this is left: two builds of one code differ by more, and later builds may lose it."""

_PROFILES, _ROUNDS = 3, 8

_TURNS, _SECONDS = (20, 200), 3.0
"""How often the two models take turns, at least and at most, and for how long where they are fast."""

_QUANTILE = 0.2
"""Of the times of a model, the one that counts: other processes make calls longer, never shorter."""


def settled(
    model: Model, target: Target, machine: Machine, tasks: Tasks, tuned: Tuned, inputs: Sequence[Any]
) -> Outcome:
    """What to keep of the choices for a model; the ratio is of its time tuned over untuned."""
    nothing = Outcome(tasks.model, {}, {}, (), 1.0)
    tuned = _used(tasks, tuned)
    if not tuned.kernels and not tuned.algorithms:
        return nothing
    tensors = list(inputs)

    def build(choices: Tuned | None) -> TvmArtifact:
        made = TvmBackend().compile(model, target, threads=machine.threads, exact_float=machine.exact, tuned=choices)
        assert isinstance(made, TvmArtifact)
        return made

    plain, better = build(None), build(tuned)
    slower = _slower(plain, better, tasks, tuned, tensors)
    kept = _without(tasks, tuned, slower)
    if slower and (kept.kernels or kept.algorithms):
        better = build(kept)
    every = tuple(sorted([*tuned.kernels, *tuned.algorithms]))
    if not (kept.kernels or kept.algorithms) or not _same(plain, better, tensors):
        return Outcome(tasks.model, {}, {}, every, 1.0)
    ratio = in_turns(better, plain, tensors)
    if ratio >= 1:
        return Outcome(tasks.model, {}, {}, every, 1.0)
    if ratio > _WORTH:  # a longer search may find more to go with it: it is not dropped
        return Outcome(tasks.model, {}, {}, tuple(sorted(slower)), 1.0)
    return Outcome(tasks.model, kept.algorithms, kept.kernels, tuple(sorted(slower)), ratio)


def in_turns(better: TvmArtifact, plain: TvmArtifact, tensors: list[Any]) -> float:
    """Time of the one over that of the other, in turns."""
    times: dict[TvmArtifact, list[float]] = {better: [], plain: []}
    least, most = _TURNS
    start = time.perf_counter()
    while len(times[plain]) < least or (len(times[plain]) < most and time.perf_counter() - start < _SECONDS):
        order = (better, plain) if len(times[plain]) % 2 else (plain, better)
        for artifact in order:
            begin = time.perf_counter()
            artifact.run(tensors)
            times[artifact].append(time.perf_counter() - begin)
    return float(np.quantile(times[better], _QUANTILE) / np.quantile(times[plain], _QUANTILE))


def _used(tasks: Tasks, tuned: Tuned) -> Tuned:
    """The choices for functions that the model has with these algorithms."""
    keys = {key for key in tasks.calls if tasks.known[key].problem not in tuned.algorithms}
    for problem, algorithm in tuned.algorithms.items():
        keys |= set(tasks.others[problem][algorithm])
    return Tuned(tuned.algorithms, {key: choices for key, choices in tuned.kernels.items() if key in keys})


def _slower(plain: TvmArtifact, better: TvmArtifact, tasks: Tasks, tuned: Tuned, tensors: list[Any]) -> set[str]:
    """Problems with another algorithm, and functions with other choices, that take longer in the model."""
    before: dict[str, list[float]] = defaultdict(list)
    after: dict[str, list[float]] = defaultdict(list)
    for _ in range(_PROFILES):
        for artifact, found in ((plain, before), (better, after)):
            for site, seconds in _by_site(artifact, tasks, tuned, tensors).items():
                found[site].append(seconds)
    sites = {*tuned.algorithms, *(key for key in tuned.kernels if tasks.known[key].problem not in tuned.algorithms)}
    return {site for site in sites if min(after[site], default=0.0) > min(before[site], default=0.0)}


def _by_site(artifact: TvmArtifact, tasks: Tasks, tuned: Tuned, tensors: list[Any]) -> dict[str, float]:
    """Seconds of a run by problem, where its algorithm is another one, and else by function."""
    assert artifact.built is not None
    found: dict[str, float] = defaultdict(float)
    for kernel in profile(artifact, tensors, rounds=_ROUNDS, warmup=1).kernels:
        key = artifact.built.tasks.get(kernel.name, "")
        task = tasks.known.get(key)
        found[task.problem if task is not None and task.problem in tuned.algorithms else key] += kernel.fastest
    return found


def _without(tasks: Tasks, tuned: Tuned, sites: set[str]) -> Tuned:
    algorithms = {problem: name for problem, name in tuned.algorithms.items() if problem not in sites}
    kernels = {
        key: choices
        for key, choices in tuned.kernels.items()
        if key not in sites and (tasks.known[key].problem in algorithms or key in tasks.calls)
    }
    return _used(tasks, Tuned(algorithms, kernels))


def _same(plain: TvmArtifact, better: TvmArtifact, tensors: list[Any]) -> bool:
    for expected, found in zip(_arrays(plain, tensors), _arrays(better, tensors), strict=True):
        if expected.dtype.kind != "f":
            if not np.array_equal(expected, found):
                return False
            continue
        apart = ~((expected == found) | (np.isnan(expected) & np.isnan(found)))
        largest = np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0) or 1.0
        if not np.max(np.abs(expected[apart] - found[apart]), initial=0.0) <= _TOLERANCE * largest:  # NaN is not
            return False
    return True


def _arrays(artifact: TvmArtifact, tensors: list[Any]) -> list[Any]:
    return [np.asarray(result) for result in artifact.run(tensors)]
