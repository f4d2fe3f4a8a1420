"""Latency on two threads beside other busy processes: what a machine that is shared does to a call.

    python -m benchmarks.beside                  measure, and write the table of docs/performance.md
    python -m benchmarks.beside --table          write the table from the results that are there

Threads of a pool that wait for one another lose more than their share when the system lets one of them wait.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency_case import take_turns, timing
from benchmarks.latency_engines import ENGINES
from benchmarks.latency_models import build
from benchmarks.machine import commit, machine, versions

__all__ = ["RESULTS", "page", "table"]

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/beside.json", ROOT / "docs/performance.md"
BEGIN, END = "<!-- begin: python -m benchmarks.beside -->", "<!-- end of beside -->"
MODELS, SHOWN = ("mobilenet_v2", "resnet18", "deit_tiny"), ("ours", "onnxruntime", "openvino-f32")
THREADS, BUSY, ROUNDS, PAUSE_SECONDS = 2, (0, 1, 2), 15, 0.2


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that do nothing but take processor time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(model: str) -> dict[str, Any]:
    """Times of every engine beside each number of busy processes, which the engines meet in turns."""
    subject = build(model, 1)
    with tempfile.TemporaryDirectory(prefix="graphopt-beside-") as folder:
        file = subject.write_onnx(Path(folder))
        calls = {name: ENGINES[name](subject, THREADS, lambda: file).call for name in SHOWN}
        found = {}
        for count in BUSY:
            with busy_processes(count):
                samples, _ = take_turns(calls, ROUNDS, PAUSE_SECONDS)
            found[str(count)] = {name: timing(taken.steady) for name, taken in samples.items()}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for every model and number of busy processes, medians in milliseconds."""
    lines = ["| model | busy processes | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for model, counts in results["models"].items():
        for count, engines in counts.items():
            medians = " | ".join(f"{engines[name]['median_ms']:.1f}" for name in SHOWN)
            lines.append(f"| {model} | {count} | {medians} |")
    where = results["machine"]
    return "\n".join([*lines, "", f"Medians in ms, {THREADS} threads, {where['processor']}, {where['cores']} cores."])


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its generated part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, unless only the table is wanted, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__.partition("\n")[0])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args(arguments).table:
        torch.set_num_threads(THREADS)
        os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
        facts = {
            "machine": machine(),
            "versions": versions("apache-tvm", "onnxruntime", "openvino"),
            "commit": commit(),
        }
        results = {**facts, "models": {model: measure(model) for model in MODELS}}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
