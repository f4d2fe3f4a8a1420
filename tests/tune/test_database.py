"""The database of measurements: what counts, what survives, what is merged, what is refused."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices
from graphopt.backends.tvm.tune.database import Database, Outcome, Row, Standing
from graphopt.errors import UsageError
from tests.backends.kernels.building import examples
from tests.tune.nets import ENVIRONMENT, ONE, TWO, ok


def test_a_candidate_counts_when_it_was_measured_twice() -> None:
    once = Standing([ok("t", ONE, 0.8)])
    assert once.best() == (1.0, RULES_CHOOSE) and once.challengers(3) == [ONE]
    twice = Standing([ok("t", ONE, 0.8), ok("t", ONE, 0.9)])
    assert twice.best()[1] == ONE and twice.best()[0] == pytest.approx(0.85) and twice.challengers(3) == []
    near = Standing([ok("t", ONE, 0.995), ok("t", ONE, 0.995)])
    assert near.best() == (1.0, RULES_CHOOSE)  # within noise of what the rules choose


def test_what_failed_once_never_counts() -> None:
    for status in ("wrong", "refused", "crash", "timeout"):
        rows = [ok("t", ONE, 0.5), ok("t", ONE, 0.5), Row("t", ONE, status)]
        assert Standing(rows).best() == (1.0, RULES_CHOOSE), status
        assert ONE in Standing(rows).seen
    noisy = Standing([Row("t", ONE, "noisy", 0.5, 1.0), ok("t", TWO, 0.9), ok("t", TWO, 0.9)])
    assert noisy.best()[1] == TWO and ONE not in noisy.seen  # it may be tried again


def test_the_challengers_are_those_that_seem_better_than_the_best() -> None:
    third = Choices(steps=8)
    rows = [ok("t", ONE, 0.9), ok("t", ONE, 0.9), ok("t", TWO, 0.85), ok("t", third, 0.95)]
    assert Standing(rows).challengers(3) == [TWO]


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    number = st.integers(1, 64)
    return Choices(
        draw(st.none() | st.tuples(number, number)),
        draw(st.none() | number),
        draw(st.none() | st.booleans()),
        draw(st.none() | st.lists(number, min_size=1, max_size=3).map(tuple)),
    )


@examples(50)
@given(choices())
def test_choices_survive_json(chosen: Choices) -> None:
    assert Choices.from_json(chosen.to_json()) == chosen


def test_rows_and_outcomes_are_there_after_opening_again(tmp_path: Path) -> None:
    rows = [ok("a", ONE, 0.8), Row("a", TWO, "crash", why="it died"), ok("b", RULES_CHOOSE, 1.0, 2.0)]
    outcomes = [
        Outcome("m", {"p": "strassen"}, {"a": ONE}, ("b",), 0.9),
        Outcome("m", {}, {"a": TWO}, ("b", "c"), 0.8),
    ]
    first = Database(tmp_path, ENVIRONMENT)
    first.add(rows)
    for outcome in outcomes:
        first.add_outcome(outcome)
        time.sleep(0.001)
    first.close()
    again = Database(tmp_path / "tuning.sqlite", ENVIRONMENT)
    assert again.standing("a").rows == rows[:2] and again.standing("b").seconds == 2.0
    assert again.outcome("m") == outcomes[1] and again.outcome("other") is None
    assert again.dropped() == {"b", "c"}
    assert again.tasks() == ["a", "b"]


def test_other_environments_are_ignored_and_said_so(tmp_path: Path) -> None:
    old = Database(tmp_path, replace(ENVIRONMENT, kernels=0, processor="another"))
    old.add([ok("a", ONE, 0.5), ok("a", ONE, 0.5)])
    assert old.ignored() is None
    new = Database(tmp_path, ENVIRONMENT)
    assert new.standing("a").best() == (1.0, RULES_CHOOSE)
    assert new.ignored() == "tuning.sqlite: 2 measurements of another kernels, processor are ignored"


def test_merging_adds_what_is_missing_once(tmp_path: Path) -> None:
    one, other = (Database(tmp_path / name, ENVIRONMENT) for name in ("one", "other"))
    one.add([ok("a", ONE, 0.8)])
    other.add([ok("a", ONE, 0.7), ok("b", TWO, 0.6)])
    other.add_outcome(Outcome("m", {}, {"b": TWO}, (), 0.6))
    assert one.merge(tmp_path / "other") == 2
    assert one.merge(tmp_path / "other") == 0
    assert one.standing("a").best()[1] == ONE and len(one.standing("a").rows) == 2
    assert one.outcome("m") is not None and len(other.standing("a").rows) == 1
    with pytest.raises(UsageError, match="there is no database"):
        one.merge(tmp_path / "nowhere")


def test_what_is_no_such_database_is_refused(tmp_path: Path) -> None:
    newer, foreign, noise = (tmp_path / f"{name}.sqlite" for name in ("newer", "foreign", "noise"))
    with sqlite3.connect(newer) as file:
        file.execute("PRAGMA user_version = 99")
    with sqlite3.connect(foreign) as file:
        file.execute("CREATE TABLE songs (name TEXT)")
    noise.write_bytes(os.urandom(5000))
    for path, why in ((newer, "format is 99"), (foreign, "other tables"), (noise, "not a database")):
        with pytest.raises(UsageError, match=why):
            Database(path, ENVIRONMENT)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=re.escape("cannot be used")):
        Database(tmp_path / "file" / "inside", ENVIRONMENT)


def test_nothing_that_was_written_is_lost_to_kill(tmp_path: Path) -> None:
    """Ten processes write and are killed at once; every row that one had written is there, and the file is sound."""
    read, write = os.pipe()
    for turn in range(10):
        child = os.fork()
        if child == 0:
            database = Database(tmp_path, ENVIRONMENT)
            for number in range(100_000):
                database.add([ok(f"task {turn}", ONE, 0.5 + number / 1e6) for _ in range(3)])
                os.write(write, bytes([turn]))
        time.sleep(0.02 + 0.011 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(write)
    told = b"".join(iter(lambda: os.read(read, 1 << 16), b""))
    os.close(read)
    database = Database(tmp_path, ENVIRONMENT)
    kept = [len(database.standing(f"task {turn}").rows) for turn in range(10)]
    assert sum(kept) > 0
    for turn, rows in enumerate(kept):
        assert rows % 3 == 0  # a batch is there as a whole or not at all
        assert told.count(bytes([turn])) <= rows // 3 <= told.count(bytes([turn])) + 1
    with sqlite3.connect(tmp_path / "tuning.sqlite") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_is_told_in_one_line_and_what_was_written_stays(tmp_path: Path) -> None:
    database = Database(tmp_path, ENVIRONMENT)
    database.add([ok("a", ONE, 0.9)])
    database._file.execute("PRAGMA max_page_count = 1")  # as if there were no room for more
    with pytest.raises(UsageError, match=r"cannot be used") as told:
        for _ in range(100):
            database.add([ok("b" * 1000, ONE, 0.9)] * 10)
    assert "full" in str(told.value)
    assert "make room" in str(told.value)
    database.close()
    assert [row.task for row in Database(tmp_path, ENVIRONMENT).standing("a").rows] == ["a"]
