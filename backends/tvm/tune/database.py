"""Every measurement that was made, in an SQLite file to which rows are only ever added.

A row is written when it is known and then survives whatever ends the process. Files of several machines become one by
`merge`. Rows count where they were measured: under the same versions, on the same processor, for the same target and
number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import statistics
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from graphopt.backends.tvm.kernels.choices import KERNELS, RULES_CHOOSE, Choices
from graphopt.cpus import processor
from graphopt.errors import UsageError
from graphopt.target import Target

__all__ = ["Database", "Environment", "Outcome", "Row", "Standing", "Status", "database_file"]

Status = Literal["ok", "wrong", "refused", "crash", "timeout", "noisy"]
"""Whether a candidate counts, or why not; `noisy` ones may be tried again."""

_SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS environments (id TEXT PRIMARY KEY, facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS measurements (
    id TEXT PRIMARY KEY, environment TEXT NOT NULL, task TEXT NOT NULL, choices TEXT NOT NULL, status TEXT NOT NULL,
    ratio REAL, seconds REAL, why TEXT NOT NULL, at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_task ON measurements (environment, task);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, environment TEXT NOT NULL, task TEXT NOT NULL, candidates TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS finished (batch TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS outcomes (
    id TEXT PRIMARY KEY, environment TEXT NOT NULL, model TEXT NOT NULL, algorithms TEXT NOT NULL,
    kernels TEXT NOT NULL, dropped TEXT NOT NULL, ratio REAL NOT NULL, at TEXT NOT NULL);
"""
_NAMES = ("environments", "measurements", "outcomes")

_GAIN = 0.99
"""Choices have to take less than this part of the time of what the rules choose."""

_ENOUGH = 2
"""Measurements, in different libraries, before a candidate counts."""


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on besides the task."""

    kernels: int
    tvm: str
    processor: str
    target: str
    threads: int
    exact: bool

    @classmethod
    def of(cls, target: Target, threads: int, *, exact: bool) -> Environment:
        """That of measurements made here and now."""
        facts = {name: value for name, value in target.to_json().items() if name != "cores"}
        text = json.dumps(facts, sort_keys=True)
        return cls(KERNELS, version("apache-tvm"), processor(), text, threads, exact)

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """One measurement: the time of a candidate, by itself and over that of what the rules choose, in turns with it."""

    task: str
    choices: Choices
    status: Status
    ratio: float | None = None
    seconds: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a whole model came to: choices that were kept, those dropped as it was slower with them, tuned / untuned."""

    model: str
    algorithms: Mapping[str, str]
    kernels: Mapping[str, Choices]
    dropped: tuple[str, ...]
    ratio: float


class Standing:
    """What is known of one task."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._ratios: dict[Choices, list[float]] = defaultdict(list)
        for row in self.rows:
            if row.status == "ok" and row.ratio is not None:
                self._ratios[row.choices].append(row.ratio)
        self._failed = {row.choices for row in self.rows if row.status not in ("ok", "noisy")}

    @property
    def seen(self) -> set[Choices]:
        """Choices that need not be tried again; noisy ones may."""
        return {row.choices for row in self.rows if row.status != "noisy"}

    @property
    def barren(self) -> int:
        """Measurements since the best candidate was first met."""
        best = self.best()[1]
        return len(self.rows) - next((n for n, row in enumerate(self.rows) if row.choices == best), 0)

    @property
    def seconds(self) -> float | None:
        """The least that what the rules choose has taken."""
        found = [row.seconds for row in self.rows if row.choices == RULES_CHOOSE and row.seconds is not None]
        return min(found) if found else None

    def ranked(self) -> list[tuple[float, Choices]]:
        """Candidates by their ratio, the best first: the median of their measurements."""
        found = [(statistics.median(r), c) for c, r in self._ratios.items() if c not in self._failed]
        return sorted(found, key=lambda pair: (pair[0], str(pair[1])))

    def best(self) -> tuple[float, Choices]:
        """The best ratio that is sure; one, and what the rules choose, where nothing is better."""
        sure = [(r, c) for r, c in self.ranked() if len(self._ratios[c]) >= _ENOUGH and c != RULES_CHOOSE]
        return sure[0] if sure and sure[0][0] < _GAIN else (1.0, RULES_CHOOSE)

    def challengers(self, count: int) -> list[Choices]:
        """Candidates that seem better than the best, and were not measured often enough to be sure."""
        least = self.best()[0]
        found = [c for r, c in self.ranked() if r < min(least, _GAIN) and len(self._ratios[c]) < _ENOUGH]
        return found[:count]


class Database:
    """The file, and of its rows those of one environment.

    Raises:
        UsageError: when the file cannot be opened, or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str], environment: Environment) -> None:
        self.path, self.environment = database_file(path), environment
        self._file = _opened(self.path)
        with self._writing():
            facts = json.dumps(asdict(environment), sort_keys=True)
            self._file.execute("INSERT OR IGNORE INTO environments VALUES (?, ?)", (environment.id, facts))

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Write all of what follows or nothing."""
        try:
            with self._file:
                yield
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    def plan(self, task: str, candidates: Iterable[Choices]) -> str:
        """Write down what will be measured, so that a search that is ended goes on with it; returns a name for it."""
        name = _new()
        with self._writing():
            text = json.dumps([choices.to_json() for choices in candidates], sort_keys=True)
            self._file.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", (name, self.environment.id, task, text))
        return name

    def unfinished(self) -> list[tuple[str, str, tuple[Choices, ...]]]:
        """Name, task and candidates of what was planned and not measured, in the order of planning."""
        found = self._file.execute(
            "SELECT id, task, candidates FROM batches WHERE environment = ?"
            " AND id NOT IN (SELECT batch FROM finished) ORDER BY rowid",
            (self.environment.id,),
        )
        return [(name, task, tuple(map(Choices.from_json, json.loads(text)))) for name, task, text in found]

    def add(self, rows: Iterable[Row], batch: str | None = None) -> None:
        """Write measurements, with which a batch is finished; all of them are there or none."""
        now, where = datetime.now(UTC).isoformat(timespec="seconds"), self.environment.id
        with self._writing():
            if batch is not None:
                self._file.execute("INSERT OR IGNORE INTO finished VALUES (?)", (batch,))
            self._file.executemany(
                "INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (_new(), where, row.task, _text(row.choices), row.status, row.ratio, row.seconds, row.why, now)
                    for row in rows
                ],
            )

    def add_outcome(self, outcome: Outcome) -> None:
        """Remember what a whole model came to."""
        kernels = {key: choices.to_json() for key, choices in outcome.kernels.items()}
        texts = (json.dumps(value, sort_keys=True) for value in (dict(outcome.algorithms), kernels, outcome.dropped))
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        with self._writing():
            self._file.execute(
                "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (_new(), self.environment.id, outcome.model, *texts, outcome.ratio, now),
            )

    def standing(self, task: str) -> Standing:
        """Every measurement of a task."""
        found = self._file.execute(
            "SELECT choices, status, ratio, seconds, why FROM measurements WHERE environment = ? AND task = ?"
            " ORDER BY rowid",
            (self.environment.id, task),
        )
        return Standing(
            Row(task, Choices.from_json(json.loads(choices)), status, ratio, seconds, why)
            for choices, status, ratio, seconds, why in found
        )

    def tasks(self) -> list[str]:
        """The keys of all tasks with measurements."""
        found = self._file.execute(
            "SELECT DISTINCT task FROM measurements WHERE environment = ?", (self.environment.id,)
        )
        return sorted(str(key) for (key,) in found)

    def outcome(self, model: str) -> Outcome | None:
        """What a model last came to."""
        row = self._file.execute(
            "SELECT algorithms, kernels, dropped, ratio FROM outcomes WHERE environment = ? AND model = ?"
            " ORDER BY at DESC LIMIT 1",
            (self.environment.id, model),
        ).fetchone()
        if row is None:
            return None
        kernels = {key: Choices.from_json(choices) for key, choices in json.loads(row[1]).items()}
        return Outcome(model, json.loads(row[0]), kernels, tuple(json.loads(row[2])), float(row[3]))

    def dropped(self) -> set[str]:
        """Functions and problems that the last outcome of some model goes without: it was slower with what is best."""
        rows = self._file.execute(
            "SELECT model, dropped FROM outcomes WHERE environment = ? ORDER BY at", (self.environment.id,)
        )
        last = {str(model): json.loads(dropped) for model, dropped in rows}
        return {site for sites in last.values() for site in sites}

    def count(self) -> tuple[int, int]:
        """Measurements of this environment, and of others."""
        own, every = (
            int(self._file.execute(f"SELECT COUNT(*) FROM measurements {where}", values).fetchone()[0])
            for where, values in (("WHERE environment = ?", (self.environment.id,)), ("", ()))
        )
        return own, every - own

    def ignored(self) -> str | None:
        """What rows of other environments differ in, in one line; None where there are none."""
        _, others = self.count()
        if not others:
            return None
        own, names = asdict(self.environment), set[str]()
        for (text,) in self._file.execute("SELECT facts FROM environments"):
            facts = json.loads(text)
            names |= {name for name in own if facts.get(name) != own[name]}
        return f"{self.path.name}: {others} measurements of another {', '.join(sorted(names))} are ignored"

    def rows(self) -> dict[str, list[list[Any]]]:
        """What belongs to this environment, by table."""
        found = {}
        for name in _NAMES:
            column = "id" if name == "environments" else "environment"
            rows = self._file.execute(f"SELECT * FROM {name} WHERE {column} = ?", (self.environment.id,))
            found[name] = [list(row) for row in rows]
        return found

    def add_rows(self, rows: Mapping[str, Iterable[Sequence[Any]]]) -> int:
        """Add rows that are not here, as `rows` gives them; returns how many measurements."""
        before = sum(self.count())
        with self._writing():
            for name in _NAMES:
                for row in rows[name]:
                    places = ", ".join("?" * len(row))
                    self._file.execute(f"INSERT OR IGNORE INTO {name} VALUES ({places})", tuple(row))
        return sum(self.count()) - before

    def merge(self, other: str | os.PathLike[str]) -> int:
        """Add what another file has and this one has not; returns how many measurements.

        Raises:
            UsageError: when the other file does not exist, or is something else.
        """
        path = database_file(other)
        if not path.is_file():
            raise UsageError(f"there is no database '{path}' to merge")
        _opened(path).close()
        before = sum(self.count())
        self._file.execute("ATTACH DATABASE ? AS other", (str(path),))
        with self._writing():
            for name in _NAMES:
                self._file.execute(f"INSERT OR IGNORE INTO {name} SELECT * FROM other.{name}")
        self._file.execute("DETACH DATABASE other")
        return sum(self.count()) - before


def database_file(place: str | os.PathLike[str]) -> Path:
    """The database in a folder, or the file itself."""
    path = Path(place)
    return path if path.suffix in (".sqlite", ".db") else path / "tuning.sqlite"


def _opened(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(path, timeout=60)
        found = int(file.execute("PRAGMA user_version").fetchone()[0])
        tables = {str(name) for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if found not in (0, _SCHEMA) or (found == 0 and tables):
            file.close()
            raise UsageError(
                f"'{path}' is not a database of measurements of this version",
                why=f"its format is {found}, this version reads format {_SCHEMA}" if found else "it holds other tables",
                todo="name another file",
            )
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = FULL")
        # In one transaction: a process that is killed here leaves no file that looks like something else.
        file.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_SCHEMA}; COMMIT;")
    except (sqlite3.Error, OSError) as error:
        raise _unusable(path, error) from error
    return file


def _unusable(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"the database of measurements '{path}' cannot be used", why=str(error), todo="make room, or name another file"
    )


def _text(choices: Choices) -> str:
    return json.dumps(choices.to_json(), sort_keys=True)


def _new() -> str:
    return uuid.uuid4().hex
