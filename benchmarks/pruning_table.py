"""The tables of docs/pruning_accuracy.md, from benchmarks/results/pruning.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["PAGE", "RESULTS", "page", "tables"]

RESULTS = Path(__file__).parent / "results" / "pruning.json"
PAGE = Path(__file__).parent.parent / "docs" / "pruning_accuracy.md"
BEGIN, END = "<!-- begin: python -m benchmarks.pruning --table -->", "<!-- end -->"


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its generated part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.split(END)[1]}"


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: for every net a table with a row for every part and method."""
    lines: list[str] = []
    for net, parts in results["nets"].items():
        lines += [f"### {net}, {100 * _trained(parts):.1f} % when trained", ""]
        lines += ["| asked | method | MACs | latency | parameters | before tuning | after tuning | seconds |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for asked, methods in parts.items():
            lines += [row for method, found in methods.items() for row in _row(asked, method, found)]
        lines += [""]
    where = results["machine"]
    notes = [f"{where['processor']}, {where['cores']} cores."]
    notes += [f"With a GPU, {device}: {', '.join(nets)}." for device, nets in _named(results, "device").items()]
    notes += [f"Latencies on {name}: {', '.join(nets)}." for name, nets in _named(results, "processor").items()]
    return "\n".join([*lines, " ".join(notes)])


def _named(results: Mapping[str, Any], what: str) -> dict[str, list[str]]:
    """The nets of which some rows name a device, or a processor."""
    found: dict[str, list[str]] = {}
    for net, parts in results["nets"].items():
        rows = [row for methods in parts.values() for one in methods.values() for row in one["seeds"]]
        for name in sorted({row.get(what, "") for row in rows} - {""}):
            found.setdefault(name, []).append(net)
    return found


def _row(asked: str, method: str, found: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in found["seeds"] if "after" in row]
    if not rows:
        if found["seeds"]:
            yield f"| {asked} | {method} | refused | | | | | |"
        return
    before = [row["before"] for row in rows if row["before"] is not None]
    times = [row["latency"] for row in rows if "latency" in row] or [found[key] for key in ("latency",) if key in found]
    macs, parameters = (f"{mean(row[what] for row in rows):.3f}" for what in ("macs", "parameters"))
    left = f"{macs} | {f'{mean(times):.2f}' if times else ''} | {parameters}"
    accuracy = f"{_spread(before) if before else 'none'} | {_spread([row['after'] for row in rows])}"
    yield f"| {asked} | {method} | {left} | {accuracy} | {mean(row['seconds'] for row in rows):.0f} |"


def _spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _trained(parts: Mapping[str, Any]) -> float:
    return float(next(r["trained"] for p in parts.values() for m in p.values() for r in m["seeds"] if "trained" in r))
