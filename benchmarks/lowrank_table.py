"""The table of docs/lowrank.md, from benchmarks/results/lowrank.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["PAGE", "RESULTS", "page", "table"]

RESULTS = Path(__file__).parent / "results" / "lowrank.json"
PAGE = Path(__file__).parent.parent / "docs" / "lowrank.md"
BEGIN, END = "<!-- begin: python -m benchmarks.lowrank --table -->", "<!-- end -->"


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its generated part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}"


def table(results: Mapping[str, Any]) -> str:
    """Markdown: for every net, part and method one row."""
    lines = ["| net | trained | asked | method | parameters | macs | latency | before tuning | after tuning | runs |"]
    lines += ["|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"]
    for net, parts in results["nets"].items():
        for part, methods in parts.items():
            lines += [_row(net, part, method, rows) for method, rows in methods.items()]
    where = results["machine"]
    return "\n".join([*lines, "", f"{where['processor']}, {where['cores']} cores."])


def _row(net: str, part: str, method: str, rows: list[Mapping[str, Any]]) -> str:
    done = [row for row in rows if "after" in row]
    if not done:
        return f"| {net} | | {part} | {method} | refused: {rows[0]['refused']} | | | | | {len(rows)} |"
    left = " | ".join(f"{mean(row[what] for row in done):.2f}" for what in ("parameters", "macs", "latency"))
    accuracy = " | ".join(_spread([row[what] for row in done]) for what in ("before", "after"))
    return f"| {net} | {100 * done[0]['trained']:.1f} | {part} | {method} | {left} | {accuracy} | {len(done)} |"


def _spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
