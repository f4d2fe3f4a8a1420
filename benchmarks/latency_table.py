"""What the latency results come to: for every batch size and number of threads a table, and docs/performance.md.

    python -m benchmarks.latency_table           write the generated part of docs/performance.md from the results

Results of other machines than the last are kept beside its own, as results/latency-NAME.json.

The ratio of a model is the best median of ONNX Runtime, OpenVINO in float32 and TorchInductor over ours: 2 is twice as
fast as the fastest of them. An engine whose outputs are off by more than `TOLERANCE` does not compete.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.latency_engines import ENGINES, RIVALS
from graphopt.tools.console import data, show_table

__all__ = ["RESULTS", "Row", "Summary", "page", "print_tables", "summaries"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/latency.json"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- begin: python -m benchmarks.latency_table -->", "<!-- end -->"
TOLERANCE = 1e-3
"""Of the largest output, in float32."""
SHOWN = tuple(name for name in ENGINES if name != "ours-dynamic")


@dataclass(frozen=True)
class Row:
    """One model: the best other and how much longer it takes than ours; neither where one of the two is missing."""

    model: str
    engines: Mapping[str, Mapping[str, Any]]
    best: str | None
    ratio: float | None


@dataclass(frozen=True)
class Summary:
    """All models at one batch size and number of threads."""

    batch: int
    threads: int
    rows: tuple[Row, ...]

    @property
    def ratios(self) -> dict[str, float]:
        return {row.model: row.ratio for row in self.rows if row.ratio is not None}

    @property
    def mean(self) -> float | None:
        """The geometric mean, with which a ratio of 2 and one of 1/2 make 1."""
        logarithms = [math.log(ratio) for ratio in self.ratios.values()]
        return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None

    @property
    def worst(self) -> str | None:
        return min(self.ratios, key=self.ratios.__getitem__, default=None)

    @property
    def verdict(self) -> str:
        """The summary in a sentence, the models without a ratio named."""
        if self.mean is None or self.worst is None:
            return "No model has a ratio."
        worst = f"worst {self.ratios[self.worst]:.2f} ({self.worst})"
        missing = [row.model for row in self.rows if row.ratio is None]
        left_out = f"; without {', '.join(missing)}" if missing else ""
        return f"Geometric mean of {len(self.ratios)} ratios {self.mean:.2f}, {worst}{left_out}."


def summaries(results: Mapping[str, Any]) -> Iterator[Summary]:
    """One for every batch size and number of threads there are."""
    rows = list(results["cases"].values())
    for batch, threads in sorted({(row["batch"], row["threads"]) for row in rows}):
        chosen = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads)]
        yield Summary(batch, threads, tuple(map(_row, chosen)))


def _row(case: Mapping[str, Any]) -> Row:
    """A case that failed as a whole failed in every engine."""
    failed = {name: {"failed": case["failed"]} for name in case["engines"]} if "failed" in case else case["engines"]
    engines: Mapping[str, Mapping[str, Any]] = failed
    others = [name for name in RIVALS if _competes(engines.get(name))]
    best = min(others, key=lambda name: float(engines[name]["median_ms"]), default=None)
    if best is None or not _competes(engines.get("ours")):
        return Row(case["model"], engines, best, None)
    return Row(case["model"], engines, best, engines[best]["median_ms"] / engines["ours"]["median_ms"])


def _competes(engine: Mapping[str, Any] | None) -> bool:
    return bool(engine and "failed" not in engine and engine["error"] is not None and engine["error"] <= TOLERANCE)


def _latencies(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and body. Milliseconds; in brackets those of an engine that is off."""
    names = [name for name in ENGINES if any(name in row.engines for row in summary.rows)]
    body = []
    for row in summary.rows:
        cells = [_milliseconds(name, row.engines.get(name)) for name in names]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        body.append([row.model, *cells, row.best or "", ratio])
    return ["model", *names, "best other", "best other / ours"], body


def _milliseconds(name: str, engine: Mapping[str, Any] | None) -> str:
    if engine is None or "failed" in engine:
        return "" if engine is None else "failed"
    text = f"{engine['median_ms']:.3g}" if engine["median_ms"] < 100 else f"{engine['median_ms']:.0f}"
    return text if _competes(engine) or name == "openvino-default" else f"({text})"


def _after_pause(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of first calls; none of results that did not keep them."""
    names = [name for name in ENGINES if any("after_pause_ms" in row.engines.get(name, {}) for row in summary.rows)]
    body = []
    for row in summary.rows:
        firsts = {name: row.engines[name].get("after_pause_ms") for name in names if name in row.engines}
        if "ours" in names and firsts.get("ours"):
            others = [firsts[name] for name in RIVALS if firsts.get(name) and _competes(row.engines[name])]
            ratio = f"{min(others) / firsts['ours']:.2f}" if others else ""
            body.append([row.model, *(f"{firsts[n]:.3g}" if firsts.get(n) else "" for n in names), ratio])
    return ["model", *names, "best other / ours"], body


def _building(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table on what it takes until the first output is there, from the smallest cases."""
    first = next(summaries(results))
    stages = ("capture_seconds", "exact_seconds", "compile_seconds")
    others = [name for name in SHOWN if name not in ("ours", "eager")]
    body = []
    for row in first.rows:
        ours = row.engines.get("ours", {"failed": ""})
        cells = ["failed"] * 5 if "failed" in ours else [f"{ours[stage]:.1f}" for stage in stages]
        if "failed" not in ours:
            growth = ours["memory_peak_mb"] - ours["memory_before_mb"]
            cells += [f"{ours['weight_mb']:.0f}", f"{growth:.0f}"]
        body.append([row.model, *cells, *(_seconds(row.engines.get(name)) for name in others)])
    return ["model", "capture", "exact", "compile", "weights MB", "growth MB", *others], body


def _seconds(engine: Mapping[str, Any] | None) -> str:
    return f"{engine['ready_seconds']:.1f}" if engine and "failed" not in engine else ""


def print_tables(results: Mapping[str, Any]) -> None:
    """All summaries, to stdout."""
    for summary in summaries(results):
        header, body = _latencies(summary)
        show_table(header, body, title=_title(summary), right=header[1:-2] + header[-1:])
        data(f"{summary.verdict}\n")


def _title(summary: Summary) -> str:
    return f"Batch {summary.batch}, {summary.threads} thread{'s' if summary.threads > 1 else ''}"


def generated(machines: Sequence[Mapping[str, Any]]) -> str:
    """The generated part of the page: a section for the results of every machine."""
    return "\n\n".join(_section(results) for results in machines if results["cases"]) or "Not measured yet."


def _section(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    parts = [f"### {_place(machine)}"]
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commits = sorted({row["commit"].removesuffix("-dirty") for row in results["cases"].values()})
    parts.append(f"{machine['cores']} cores, {machine['memory_gb']} GB. {packages}. Commit {', '.join(commits)}.")
    parts.append("Median milliseconds of a call; in brackets those of an engine whose outputs are off.")
    for summary in summaries(results):
        parts += [f"#### {_title(summary)}", _markdown(*_latencies(summary)), summary.verdict]
        header, body = _after_pause(summary)
        if body:
            parts += ["The first call after a pause of 0.1 s, which wakes the threads:", _markdown(header, body)]
    parts += _rooflines(results)
    first = next(summaries(results))
    parts.append(f"#### Until the first output: {_title(first).lower()}")
    parts.append("Seconds; `weights` is their size, `growth` how far the memory of the process rose above what it was.")
    parts += [_markdown(*_building(results)), *_failures(results)]
    return "\n\n".join(parts)


def _place(machine: Mapping[str, Any]) -> str:
    """Processors of one name differ in their vectors: both."""
    bits = machine.get("target", {}).get("vector_bits")
    return f"{machine['processor']}, vectors of {bits} bits" if bits else str(machine["processor"])


def _rooflines(results: Mapping[str, Any]) -> list[str]:
    """What the machine allows and where the rest goes, for every batch size and number of threads."""
    parts = []
    for summary in summaries(results):
        rows = [row for row in summary.rows if "roofline" in row.engines.get("ours", {})]
        if rows:
            header = [
                "model",
                "GFLOP",
                "MB moved",
                "allowed ms",
                "ours ms",
                "achieved",
                "best other / allowed",
                "lost in",
            ]
            parts += [
                f"#### Roofline: {_title(summary).lower()}",
                _ceilings(rows),
                _markdown(header, list(map(_rests, rows))),
            ]
    return parts


def _ceilings(rows: Sequence[Row]) -> str:
    """The middle ones of the ceilings, which every case measured anew."""
    found = [row.engines["ours"]["roofline"] for row in rows]
    flops, moved = (median(one[name] for one in found) for name in ("gflops_per_second", "gb_per_second"))
    return (
        f"The ceilings: {flops:.0f} GFLOP/s and {moved:.0f} GB/s. `allowed` is what they allow our kernels, `best "
        "other / allowed` what the ratio could be at most; `lost in` names the kinds of kernel with most of the "
        "difference, in ms."
    )


def _rests(row: Row) -> list[str]:
    ours = row.engines["ours"]
    found, median_ms = ours["roofline"], ours["median_ms"]
    lost = {rule: taken - allowed for rule, (taken, allowed) in found["rules"].items()}
    most = sorted(lost, key=lambda rule: -lost[rule])[:3]
    best = "" if row.best is None else f"{row.engines[row.best]['median_ms'] / found['allowed_ms']:.2f}"
    numbers = [f"{found[name]:.3g}" for name in ("gflop", "mb_moved", "allowed_ms")]
    share = f"{found['allowed_ms'] / median_ms:.0%}"
    return [row.model, *numbers, f"{median_ms:.3g}", share, best, ", ".join(f"{r} {lost[r]:.2g}" for r in most)]


def _failures(results: Mapping[str, Any]) -> list[str]:
    """What failed and why, engines that failed alike together; nothing where all is well."""
    lines = []
    for summary in summaries(results):
        for row in summary.rows:
            reasons: dict[str, list[str]] = {}
            for name, engine in row.engines.items():
                if "failed" in engine:
                    reasons.setdefault(engine["failed"][:300].replace("`", "'"), []).append(name)
            place = f"{row.model}, {_title(summary).lower()}"
            lines += [f"- {place}, {', '.join(names)}: `{reason}`" for reason, names in reasons.items()]
    return ["#### Failures", "\n".join(lines)] if lines else []


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))


def page(text: str, machines: Sequence[Mapping[str, Any]]) -> str:
    """A page with the part between its two markers made anew.

    Raises:
        ValueError: it has not each of the markers once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the page needs {BEGIN} and {END} after it, once each")
    return f"{before}{BEGIN}\n\n{generated(machines)}\n\n{END}{after}"


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The results that there are: those in the file, and those of other machines beside it."""
    others = sorted(path.parent.glob(f"{path.stem}-*.json"))
    return [json.loads(file.read_text()) for file in (path, *others) if file.exists()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_table", description=__doc__.partition("\n")[0])
    parser.parse_args(arguments)
    PAGE.write_text(page(PAGE.read_text(), read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
