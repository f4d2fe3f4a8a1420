"""The measurements that come with the package: they are of this version, and count where every other does."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.tvm.kernels.choices import KERNELS, Choices
from graphopt.backends.tvm.tune.database import Database, Environment, Outcome
from graphopt.backends.tvm.tune.shipped import add_shipped, shipped_rows, worth_shipping, write
from graphopt.target import this_machine
from tests.tune import nets

BEST, OTHER = Choices(tile=(7, 1)), Choices(tile=(3, 2), steps=2)


def environment(threads: int = 1) -> Environment:
    return Environment.of(this_machine(), threads, exact=False)


def shipped_environments() -> list[Environment]:
    return [Environment(**json.loads(facts)) for _, facts in shipped_rows()["environments"]]


def test_every_row_is_of_these_kernels_and_this_compiler() -> None:
    found = shipped_environments()
    assert found
    for (name, _), one in zip(shipped_rows()["environments"], found, strict=True):
        assert one.id == name
        assert one.kernels == KERNELS, "made for other kernels: python -m benchmarks.tuning ship"
        assert one.tvm == version("apache-tvm")


@pytest.mark.parametrize("one", shipped_environments(), ids=lambda one: f"{one.processor} {one.threads}")
def test_what_models_keep_was_measured_to_be_faster(one: Environment, tmp_path: Path) -> None:
    database = Database(tmp_path, one)
    assert add_shipped(database) > 0
    assert add_shipped(database) == 0
    models = {str(row[2]) for row in shipped_rows()["outcomes"] if row[1] == one.id}
    assert len(models) >= 10
    for model in models:
        outcome = database.outcome(model)
        assert outcome is not None
        assert outcome.ratio <= 1
        for key, choices in outcome.kernels.items():
            ratios = {measured: ratio for ratio, measured in database.standing(key).ranked()}
            assert ratios[choices] < 1


def test_nothing_is_added_where_nothing_of_the_kind_was_measured(tmp_path: Path) -> None:
    database = Database(tmp_path, replace(environment(), processor="another"))
    assert add_shipped(database) == 0
    assert database.count() == (0, 0)


def measured(place: Path) -> Database:
    """Two models tuned twice, with measurements that nobody needs."""
    database = Database(place, environment())
    database.add([nets.ok("a", Choices(), 1.0), *[nets.ok("a", BEST, 0.8)] * 2, nets.ok("a", OTHER, 1.4)])
    database.add([nets.ok("b", Choices(), 1.0), *[nets.ok("b", OTHER, 0.9)] * 2, nets.ok("c", OTHER, 1.1)])
    database.add_outcome(Outcome("one", {}, {"b": OTHER}, (), 0.99))
    database.add_outcome(Outcome("one", {"product": "plain"}, {"a": BEST}, ("b",), 0.9))
    database.add_outcome(Outcome("two", {}, {}, ("a",), 1.0))
    return database


def test_what_builds_need_is_shipped_and_nothing_else(tmp_path: Path) -> None:
    database = measured(tmp_path / "measured")
    rows = worth_shipping(database)
    assert [(row[2], row[3]) for row in rows["measurements"] if row[3] == "{}"] == [("a", "{}")]
    assert sum(row[2] == "a" for row in rows["measurements"]) == len(rows["measurements"]) == 3
    write(rows, tmp_path / "file.json")
    again = Database(tmp_path / "again", environment())
    assert again.add_rows(json.loads((tmp_path / "file.json").read_text())) == 3
    assert again.standing("a").best() == database.standing("a").best() == (0.8, BEST)
    assert [again.outcome(model) for model in ("one", "two")] == [database.outcome(model) for model in ("one", "two")]
    assert again.dropped() == {"a", "b"}


def test_writing_replaces_an_environment_and_forgets_older_kernels(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    rows = worth_shipping(measured(tmp_path / "measured"))
    old = replace(environment(), kernels=KERNELS - 1)
    write(_of(rows, old), file)
    write(_of(rows, environment(3)), file)
    write(rows, file)
    write(rows, file)
    found = json.loads(file.read_text())
    assert {row[0] for row in found["environments"]} == {environment().id, environment(3).id}
    assert len(found["measurements"]) == 2 * len(rows["measurements"])
    assert len(found["outcomes"]) == 2 * len(rows["outcomes"])


def _of(rows: dict[str, list[list[object]]], one: Environment) -> dict[str, list[list[object]]]:
    """The same rows as if they were of another environment."""
    facts = json.dumps({name: getattr(one, name) for name in one.__dataclass_fields__})
    moved = {name: [[row[0], one.id, *row[2:]] for row in rows[name]] for name in ("measurements", "outcomes")}
    return {"environments": [[one.id, facts]], **moved}


def small() -> go.Model:
    torch.manual_seed(0)
    return go.capture(nn.Linear(32, 24).eval(), (torch.randn(3, 32),))


def test_a_build_may_take_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    artifact = go.build(small(), threads=1, tuned="shipped")
    facts = artifact.record["tuned"]
    assert [facts[name] for name in ("kernels", "algorithms", "whole_model")] == [0, 0, False]
    assert "threads are ignored" in facts["ignored"]  # what is shipped is for two
    expected = np.asarray(go.build(small(), threads=1)(x))
    assert np.abs(np.asarray(artifact(x)) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert not list(tmp_path.iterdir())


def test_what_is_shipped_for_the_functions_of_a_model_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends.tvm.tune.tasks import extract

    (key,) = extract(small(), this_machine(), nets.machine()).calls
    database = Database(tmp_path / "measured", environment())
    database.add([nets.ok(key, BEST, 0.5), nets.ok(key, BEST, 0.5), nets.ok(key, Choices(), 1.0)])
    database.add_outcome(Outcome("another model", {}, {key: BEST}, (), 0.7))
    rows = worth_shipping(database)
    monkeypatch.setattr("graphopt.backends.tvm.tune.chosen.shipped_rows", lambda: rows)
    monkeypatch.chdir(tmp_path)
    artifact = go.build(small(), threads=1, tuned="shipped")
    assert artifact.record["tuned"] == {"kernels": 1, "algorithms": 0, "whole_model": False}


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Database("shipped", environment()).add([nets.ok("a", BEST, 0.5)])
    artifact = go.build(small(), threads=2, tuned="shipped")
    assert "1 measurements of another threads are ignored" in artifact.record["tuned"]["ignored"]
