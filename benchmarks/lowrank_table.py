"""The tables of docs/lowrank.md, from what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["MEMORY", "PAGE", "PRETRAINED", "RESULTS", "page", "table"]

RESULTS = Path(__file__).parent / "results" / "lowrank.json"
PRETRAINED = RESULTS.with_stem("lowrank_pretrained")
MEMORY = RESULTS.with_stem("lowrank_memory")
PAGE = Path(__file__).parent.parent / "docs" / "lowrank.md"
END = "<!-- end -->"


def page(text: str) -> str:
    """The page with its generated parts made anew, as far as there are results."""
    for program, file, made in (
        ("lowrank", RESULTS, table),
        ("lowrank_pretrained", PRETRAINED, pretrained_table),
        ("lowrank_memory", MEMORY, memory_table),
    ):
        if file.exists():
            begin = f"<!-- begin: python -m benchmarks.{program} -->"
            before, rest = text.split(begin)
            after = rest.split(END, 1)[1]
            text = f"{before}{begin}\n\n{made(json.loads(file.read_text()))}\n\n{END}{after}"
    return text


def pretrained_table(results: Mapping[str, Any]) -> str:
    """Markdown: for each of the pretrained models and every method one row."""
    lines = []
    if found := results.get("minilm"):
        lines += ["| MiniLM | linear parameters | cosine | least | order | neighbour | pairs (original) | seconds |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for method, row in found["rows"].items():
            numbers = [f"{row[name]:.3f}" for name in ("linear", "cosine", "least cosine", "order", "neighbour")]
            pairs = f"{row['pairs']:.2f} ({row['original pairs']:.2f})"
            lines.append(f"| {method} | {' | '.join(numbers)} | {pairs} | {row['seconds']:.0f} |")
        lines += ["", f"{found['tested']} sentences, calibrated with {found['calibration']} others.", ""]
    if found := results.get("efficientnet"):
        lines += [
            "| EfficientNet-Lite0 | parameters | agreement | photos of 4 | seconds |",
            "|---|---:|---:|---:|---:|",
        ]
        for part, methods in found["rows"].items():
            for method, row in methods.items():
                numbers = f"{row['agreement']:.3f} | {row['photos']} | {row['seconds']:.0f}"
                lines.append(f"| {method} | {part} | {numbers} |")
        lines += ["", f"{found['tested']} images, calibrated with {found['calibration']} others.", ""]
    return "\n".join(lines).rstrip()


def memory_table(results: Mapping[str, Any]) -> str:
    """Markdown: for either pipeline one row; sizes in millions of bytes."""
    lines = ["| | parameters | largest layer, MB | memory, MB | part of the largest | layers factorised | seconds |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for kind, row in results.items():
        sizes = " | ".join(f"{row[name] / 1e6:.0f}" for name in ("largest_bytes", "memory_bytes"))
        numbers = f"{row['part_of_largest']:.2f} | {row['layers']} | {row['seconds']:.0f}"
        where = f"{kind}, {row['machine']['cores']} cores"
        lines.append(f"| {where} | {row['parameters'] / 1e9:.2f} billion | {sizes} | {numbers} |")
    return "\n".join(lines)


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
    left = " | ".join(_mean([row[what] for row in done if what in row]) for what in ("parameters", "macs", "latency"))
    accuracy = " | ".join(_spread([row[what] for row in done]) for what in ("before", "after"))
    return f"| {net} | {100 * done[0]['trained']:.1f} | {part} | {method} | {left} | {accuracy} | {len(done)} |"


def _mean(values: list[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def _spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
