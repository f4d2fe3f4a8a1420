"""The measurements that come with the package: what was best for common models where it was measured.

`shipped.json` holds rows of the tables of a database. They count where every other row does: on the same processor, for
the same target, threads and versions. `python -m benchmarks.tuning ship` makes the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.backends.tvm.kernels.choices import KERNELS
from graphopt.backends.tvm.tune.database import Database

__all__ = ["FILE", "SHIPPED", "add_shipped", "shipped_rows", "worth_shipping", "write"]

SHIPPED = "shipped"
"""What `tuned` is called to mean this file."""

FILE = Path(__file__).parent / "shipped.json"

_PLACES = {"environments": 0, "measurements": 1, "outcomes": 1}
"""Where the rows of a table name their environment."""


@cache
def shipped_rows() -> dict[str, list[list[Any]]]:
    """The rows by the name of their table."""
    found: dict[str, list[list[Any]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def add_shipped(database: Database) -> int:
    """Add what counts in the environment of a database and is not in it yet; returns how many measurements."""
    here = database.environment.id
    own = {name: [row for row in rows if row[_PLACES[name]] == here] for name, rows in shipped_rows().items()}
    return database.add_rows(own)


def write(rows: Mapping[str, list[list[Any]]], path: Path = FILE) -> None:
    """Write rows of one environment in the place of those it had; others stay, but not those of older kernels."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {name: [] for name in rows}
    fresh = {str(row[0]) for row in rows["environments"]}
    stay = {row[0] for row in known["environments"] if json.loads(row[1])["kernels"] == KERNELS} - fresh
    tables = []
    for name, own in rows.items():
        others = [row for row in known[name] if row[_PLACES[name]] in stay]
        lines = [json.dumps(row) for row in sorted([*own, *others])]
        tables.append(f'"{name}": [\n' + ",\n".join(lines) + "\n]")
    path.write_text("{" + ",\n".join(tables) + "}\n", encoding="utf-8")


def worth_shipping(database: Database) -> dict[str, list[list[Any]]]:
    """Of a database what its builds are made of: the last outcome of each model, and the measurements behind them."""
    rows = database.rows()
    last = {str(row[2]): row for row in sorted(rows["outcomes"], key=lambda row: str(row[-1]))}
    used = {(key, json.dumps(c, sort_keys=True)) for row in last.values() for key, c in json.loads(row[4]).items()}
    tasks = {key for key, _ in used}
    measured = [row for row in rows["measurements"] if (row[2], row[3]) in used]
    usual = {row[2]: row for row in rows["measurements"] if row[3] == "{}" and row[2] in tasks}
    return {
        "environments": rows["environments"],
        "measurements": sorted([*measured, *usual.values()]),
        "outcomes": sorted(last.values()),
    }
