"""Tuning from end to end: search, the model as a whole, builds that take what was kept, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.tvm.kernels.choices import Choices, Tuned
from graphopt.backends.tvm.tune import whole
from graphopt.backends.tvm.tune.database import Database, Environment, Outcome
from graphopt.backends.tvm.tune.search import Progress
from graphopt.backends.tvm.tune.tasks import Tasks, extract
from graphopt.errors import UnsupportedError, UsageError
from graphopt.target import this_machine
from tests.tools.command import graphopt, refused
from tests.tune import nets

THREADS = 1
CORE = (min(os.sched_getaffinity(0)),)


def environment() -> Environment:
    return Environment.of(this_machine(), THREADS, exact=False)


def small() -> go.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 1), nn.Flatten(), nn.Linear(48 * 36, 16))
    return go.capture(net.eval(), (torch.randn(1, 16, 6, 6),))


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return extract(small(), this_machine(), nets.machine())


def test_a_search_measures_and_a_build_takes_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Progress] = []

    def report(progress: Progress) -> None:
        said.append(progress)
        if progress.candidates > 10:
            raise KeyboardInterrupt  # as Ctrl-C does

    # One process that compiles is enough, and starts sooner.
    monkeypatch.setattr("graphopt.backends.tvm.tune.tuning.divided_cores", lambda threads: (CORE, CORE))
    found = go.tune(small(), database=tmp_path, budget=100, threads=THREADS, report=report)
    assert found.candidates > 10 and found.failed < found.candidates and found.interrupted
    assert 0 < said[-1].left < 100
    assert found.outcome is not None and found.outcome.ratio <= 1
    database = Database(tmp_path, environment())
    assert set(database.tasks()) <= set(found.tasks.known)
    assert sum(len(database.standing(key).rows) for key in database.tasks()) >= found.candidates
    assert database.outcome(found.tasks.model) == found.outcome
    tuned = go.build(small(), threads=THREADS, tuned=tmp_path)
    assert tuned.record["tuned"] == {
        "kernels": len(found.outcome.kernels),
        "algorithms": len(found.outcome.algorithms),
        "whole_model": True,
    }
    x = np.random.default_rng(0).standard_normal((1, 16, 6, 6), np.float32)
    expected = np.asarray(go.build(small(), threads=THREADS)(x))
    assert np.abs(np.asarray(tuned(x)) - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_build_takes_choices_for_its_functions_where_the_model_was_not_tuned(tasks: Tasks, tmp_path: Path) -> None:
    keys = sorted(tasks.calls)
    one = Choices(tile=(3, 2), steps=1)
    database = Database(tmp_path, environment())
    database.add([nets.ok(key, one, 0.5) for key in keys for _ in range(2)])
    plain, tuned = (go.build(small(), threads=THREADS, tuned=place) for place in (None, tmp_path))
    assert tuned.record["tuned"] == {"kernels": len(keys), "algorithms": 0, "whole_model": False}
    assert "tuned" not in plain.record
    text = [artifact.built.executable.mod.imports[0].inspect_source("ll") for artifact in (plain, tuned)]
    assert text[0] != text[1]  # other code
    database.add_outcome(Outcome("another model", {}, {}, (keys[0],), 1.0))
    assert go.build(small(), threads=THREADS, tuned=tmp_path).record["tuned"]["kernels"] == len(keys) - 1
    database.add_outcome(Outcome(tasks.model, {}, {keys[0]: one}, tuple(keys[1:]), 0.9))
    assert go.build(small(), threads=THREADS, tuned=tmp_path).record["tuned"] == {
        "kernels": 1,
        "algorithms": 0,
        "whole_model": True,
    }
    assert go.build(small(), threads=2, tuned=tmp_path).record["tuned"]["kernels"] == 0  # another number of threads


class FakeProfile:
    """In place of measuring a model: seconds by function, fewer for tuned ones or more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slower: set[str], ratio: float, same: bool = True) -> None:
        self.slower, self.built = slower, list[Tuned | None]()
        monkeypatch.setattr(whole.TvmBackend, "compile", self.compile)
        monkeypatch.setattr(whole, "_by_site", self.by_site)
        monkeypatch.setattr(whole, "_same", lambda *_: same)
        monkeypatch.setattr(whole, "in_turns", lambda *_: ratio)

    def compile(self, *_: Any, tuned: Tuned | None = None, **_options: Any) -> Any:
        self.built.append(tuned)
        made = object.__new__(whole.TvmArtifact)
        made.tuned = tuned  # type: ignore[attr-defined]
        return made

    def by_site(self, artifact: Any, _tasks: Tasks, tuned: Tuned, _tensors: Any) -> dict[str, float]:
        sites = [*tuned.algorithms, *tuned.kernels]
        if artifact.tuned is None:
            return dict.fromkeys(sites, 1.0)
        return {site: 1.1 if site in self.slower else 0.9 for site in sites}


def settled(tasks: Tasks, tuned: Tuned) -> Outcome:
    return whole.settled(small(), this_machine(), nets.machine(), tasks, tuned, [])


def test_what_is_slower_in_the_model_is_dropped(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, *_ = sorted(tasks.calls)
    tuned = Tuned({}, {one: Choices(steps=1), two: Choices(steps=2)})
    fake = FakeProfile(monkeypatch, {one}, 0.95)
    assert settled(tasks, tuned) == Outcome(tasks.model, {}, {two: Choices(steps=2)}, (one,), 0.95)
    assert fake.built == [None, tuned, Tuned({}, {two: Choices(steps=2)})]


@pytest.mark.parametrize(("ratio", "kept"), [(0.9899, True), (0.9901, False), (0.9999, False)])
def test_a_gain_within_the_noise_is_not_taken_and_may_be_looked_for_again(
    ratio: float, kept: bool, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, *_ = sorted(tasks.calls)
    tuned = Tuned({}, {one: Choices(steps=1), two: Choices(steps=2)})
    FakeProfile(monkeypatch, {one}, ratio)
    expected = ({two: Choices(steps=2)}, ratio) if kept else ({}, 1.0)
    assert settled(tasks, tuned) == Outcome(tasks.model, {}, expected[0], (one,), expected[1])


def test_a_model_that_is_not_faster_keeps_nothing(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, *_ = sorted(tasks.calls)
    tuned = Tuned({}, {one: Choices(steps=1), two: Choices(steps=2)})
    nothing = Outcome(tasks.model, {}, {}, (one, two), 1.0)
    FakeProfile(monkeypatch, set(), 1.02)
    assert settled(tasks, tuned) == nothing
    FakeProfile(monkeypatch, {one, two}, 0.5)
    assert settled(tasks, tuned) == nothing
    FakeProfile(monkeypatch, set(), 0.5, same=False)
    assert settled(tasks, tuned) == nothing  # faster, but other numbers
    assert settled(tasks, Tuned()) == Outcome(tasks.model, {}, {}, (), 1.0)


def test_another_algorithm_is_dropped_with_its_choices(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    # The model has no problem with two algorithms; here it is one that does.
    own, *_ = sorted(tasks.calls)
    problem, name, other = "product 1x1x1", "strassen", "another key"
    tasks = replace(
        tasks,
        known={**tasks.known, own: replace(tasks.known[own], problem=problem), other: tasks.known[own]},
        others={problem: {name: {other: 1}}},
    )
    tasks.known[other] = replace(tasks.known[own], key=other, algorithm=name)  # type: ignore[index]
    tuned = Tuned({problem: name}, {other: Choices(steps=1), own: Choices(steps=2)})
    FakeProfile(monkeypatch, {problem}, 0.9)
    found = settled(tasks, tuned)
    assert found.algorithms == {} and found.kernels == {} and problem in found.dropped
    FakeProfile(monkeypatch, set(), 0.9)
    assert settled(tasks, tuned) == Outcome(tasks.model, {problem: name}, {other: Choices(steps=1)}, (), 0.9)


def test_results_are_compared_by_their_largest_number() -> None:
    class Fixed:
        def __init__(self, *results: Any) -> None:
            self.results = [np.asarray(result) for result in results]

        def run(self, _tensors: Any) -> list[Any]:
            return self.results

    base = Fixed([1.0, 100.0], [1, 2])
    assert whole._same(base, Fixed([1.005, 100.0], [1, 2]), [])
    odd = Fixed([float("nan"), float("inf")], [1, 2])
    assert whole._same(odd, odd, [])
    assert not whole._same(base, Fixed([1.02, 100.0], [1, 2]), [])
    assert not whole._same(base, Fixed([1.0, float("nan")], [1, 2]), [])
    assert not whole._same(base, Fixed([1.0, 100.0], [1, 3]), [])


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be measured here"):
        go.tune(small(), "cortex-a72", database=tmp_path)
    with pytest.raises(UnsupportedError, match="for CPUs"):
        go.tune(small(), "cuda-sm_90", database=tmp_path)
    with pytest.raises(UsageError, match="there is no database"):
        go.build(small(), tuned=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="takes no measured choices"):
        go.build(small(), backend="reference", tuned=tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    for words, why in (
        (["tune"], "nothing to do"),
        (["tune", "x.onnx", "--budget", "soon"], "no length of time"),
        (["tune", "--merge", str(tmp_path / "no")], "there is no database"),
        (["build", "x.onnx", "-o", str(tmp_path / "o"), "--tune", "5m"], "--tune needs a place"),
        (["build", "x.onnx", "-o", str(tmp_path / "o"), "--tune", "5m", "--tuned", "shipped"], "cannot be added to"),
        (["build", "x.onnx", "-o", str(tmp_path / "o"), "--backend", "onnxruntime", "--tuned", "."], "no measured"),
    ):
        refused(graphopt(*words, *(["--db", tmp_path] if words[0] == "tune" else [])), 2, why)
    other = Database(tmp_path / "other", environment())
    other.add([nets.ok("task", Choices(steps=1), 0.9)])
    done = graphopt("tune", "--merge", tmp_path / "other", "--db", tmp_path)
    assert done.exit_code == 0 and done.stderr == "1 measurement added\n"
