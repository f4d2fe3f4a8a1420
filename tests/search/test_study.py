"""Studies: gone on with after a kill, shared by processes, and refused when they are others'."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

import graphopt as go
from graphopt.errors import UsageError
from graphopt.search import study as studies
from graphopt.search.result import Trial, trials_of
from tests.search.nets import batches, model
from tests.search.process import PASSES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("counted")


def start(storage: str, trials: int, seconds: float, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.search.process", storage, str(trials), str(seconds)]
    environment = {**os.environ, "GRAPHOPT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def kept(storage: str) -> list[optuna.trial.FrozenTrial]:
    try:
        return optuna.load_study(study_name="search", storage=storage).get_trials()
    except (KeyError, RuntimeError):
        return []  # not made yet


def searched(storage: str, **options: Any) -> go.search.Result:  # type: ignore[name-defined]
    given = {"calib": batches(), "passes": PASSES, "trials": 6, "backend": "reference", "storage": storage}
    return go.search(options.pop("model", None) or model(), **{**given, **options})


def test_killed_in_a_trial_it_goes_on_and_loses_nothing_and_two_share_what_is_left(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    process = start(storage, 5, 0.8, tmp_path)
    deadline = time.monotonic() + 60
    while not kept(storage):  # opening a study takes longer than looking at it again
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    running = optuna.load_study(study_name="search", storage=storage)
    while True:
        trials = running.get_trials(deepcopy=False)
        busy = [one for one in trials if one.state.name == "RUNNING" and "pipeline" in one.user_attrs]
        if busy and any(one.state.name == "COMPLETE" for one in trials):
            break
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = [one for one in kept(storage) if one.state.name == "RUNNING"]
    assert len(killed) == 1
    before = [one for one in kept(storage) if one.state.name == "COMPLETE"]
    two = [start(storage, 5, 0.3, tmp_path) for _ in range(2)]
    ran = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in two]
    assert [process.returncode for process in two] == [0, 0]
    after = kept(storage)
    assert after[killed[0].number].state.name == "FAIL"
    again = [one for one in after if one.user_attrs.get("retry_of") == killed[0].number]
    assert len(again) >= 1 and {one.user_attrs["pipeline"] for one in again} == {killed[0].user_attrs["pipeline"]}
    assert [one.values for one in after if one.number in {one.number for one in before}] == [
        one.values for one in before
    ]
    texts = [one.pipeline for one in trials_of(optuna.load_study(study_name="search", storage=storage)) if one.found]
    assert len(texts) == len(set(texts)) and 5 <= len(texts) <= 6  # both may be in a last trial
    assert not set(ran[0]) & set(ran[1])


def test_a_finished_study_is_told_again_without_a_trial_and_more_can_be_asked_for(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first, again, more = searched(storage, trials=3), searched(storage, trials=3), searched(storage, trials=4)
    assert first.trials == again.trials == more.trials[:3] and len(more.trials) == 4
    assert isinstance(first.trials[0], Trial)
    # What a study that was not broken off would have tried:
    assert searched(f"sqlite:///{tmp_path / 'other.db'}", trials=4).trials[3].pipeline == more.trials[3].pipeline


def test_what_kills_its_process_twice_is_left_alone(tmp_path: Path) -> None:
    made = optuna.create_study()
    studies.enqueue(made, {"x": 1}, {"alone": "low-rank"})
    for _ in range(2):
        trial = made.ask()
        trial.suggest_int("x", 0, 9)
        trial.set_user_attr("worker", studies.worker().rpartition(" ")[0] + " another")
        studies.recover(made)
        studies.recover(made)
    first, second = made.get_trials()
    assert [one.state.name for one in (first, second)] == ["FAIL", "FAIL"]
    assert second.user_attrs["retry_of"] == 0 and second.user_attrs["alone"] == "low-rank" and second.params == {"x": 1}


def test_a_trial_of_a_living_process_is_let_be() -> None:
    made = optuna.create_study()
    for name in (studies.worker(), f"elsewhere {2**22} x", f"{studies.worker().split()[0]} {os.getppid()} x"):
        made.ask().set_user_attr("worker", name)
    studies.recover(made)
    assert [one.state.name for one in made.get_trials()] == ["RUNNING"] * 3


def test_a_study_of_something_else_is_refused_with_what_differs(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    searched(storage, trials=1)
    other = model()
    next(iter(other.params.values())).data += 1
    for options, part in (
        ({"model": other}, "model is '"),
        ({"calib": batches(5)}, "calibration data is '"),
        ({"threads": 3}, "threads is "),
        ({"goals": {"latency": 0.5}}, "goals is 'none' there, and 'latency=0.5' here"),
        ({"passes": "low-rank{macs=0.5}"}, "and 'low-rank{macs=0.5,allocation=solve|minimax}' here"),
    ):
        with pytest.raises(UsageError, match="this study searches something else") as caught:
            searched(storage, **options)
        assert part in str(caught.value) and "study 'search' in sqlite:///" in str(caught.value)
        assert str(caught.value).count(" there, and ") == 1 + ("valid" not in options and "calib" in options)
    assert len(searched(storage, trials=1, study="another", goals={"latency": 0.9}).trials) == 1


def test_what_is_no_study_of_ours_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    theirs, foreign, text = tmp_path / "theirs.db", tmp_path / "foreign.db", tmp_path / "text.db"
    optuna.create_study(study_name="search", storage=f"sqlite:///{theirs}").optimize(lambda trial: 1.0, n_trials=1)
    with sqlite3.connect(foreign) as file:
        file.execute("CREATE TABLE latency (key TEXT)")
    text.write_text("no database " * 100)
    before = foreign.read_bytes()
    for address, part in (
        (f"sqlite:///{theirs}", "this study is none of graphopt's"),
        (f"sqlite:///{foreign}", "something else than Optuna's studies"),
        (f"sqlite:///{text}", "file is not a database"),
        (f"sqlite:///{tmp_path}/nowhere/study.db", "unable to open database file"),
        (str(theirs), f"write sqlite:///{theirs}"),
        ("nonsense://user:secret@host/x", "cannot be used"),
    ):
        with pytest.raises(UsageError, match=part) as caught:
            searched(address)
        assert "secret" not in str(caught.value) and caught.value.exit_code == 2
    assert foreign.read_bytes() == before
