"""Latency of our code against ONNX Runtime, OpenVINO, TorchInductor and eager PyTorch, on CPU without tuning.

    python -m benchmarks.latency                       all models, batch 1 and 8, 1 and 2 threads; takes hours
    python -m benchmarks.latency --resume              go on where a run of the same commit was cut off
    python -m benchmarks.latency --models resnet18,minilm_128 --threads 2 --batch 1 --dynamic
    python -m benchmarks.latency --models "" --table   print what the results file holds

Every case has a process of its own (see `latency_case.py`) and is written as soon as it is there; cases measured
earlier stay until they are measured again. Nothing else should be running. OpenVINO is `pip install openvino`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.latency_case import Case
from benchmarks.latency_engines import ENGINES
from benchmarks.latency_models import NAMES
from benchmarks.latency_table import RESULTS, print_tables
from benchmarks.machine import commit, machine, versions
from graphopt.errors import UsageError

PACKAGES = ("apache-tvm", "onnx", "onnxruntime", "openvino", "torchvision", "transformers")
OTHERS = tuple(name for name in ENGINES if not name.startswith("ours"))
CASE_SECONDS = 3600
"""A case that takes longer is given up and recorded as failed."""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All combinations, a model's together; ours with a free batch runs at batch 1."""
    for model, batch, threads in itertools.product(options.models, options.batch, options.threads):
        own = ("ours", "ours-dynamic") if options.dynamic and batch == 1 else ("ours",)
        yield Case(model, batch, threads, options.rounds, (*own, *options.others))


def run_apart(case: Case) -> dict[str, Any]:
    """Measure a case in a fresh process whose libraries see the number of threads from the start."""
    with tempfile.TemporaryDirectory(prefix="graphopt-latency-") as folder:
        asked, told = Path(folder) / "case.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(asdict(case)))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(case.threads))
        # Inductor compiles afresh: with what an earlier run left, it would seem quick to build.
        environment = os.environ | threads | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        command = [sys.executable, "-m", "benchmarks.latency_case", str(asked), str(told)]
        why = _run(command, environment)
        if why:
            return asdict(case) | {"failed": why}
        result: dict[str, Any] = json.loads(told.read_text())
    return result


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a case's process; nothing if all is well, or how it ended and the last it said: what it was about to do."""
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    try:
        done = subprocess.run(command, env=environment, timeout=CASE_SECONDS, check=False, **streams)
    except subprocess.TimeoutExpired:
        return f"not done after {CASE_SECONDS} s"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"the process ended with {done.returncode} after: {last[:300]}" if done.returncode else ""


def earlier(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Cases in a results file.

    Raises:
        UsageError: they were measured on another machine, or with other versions.
    """
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    if _place(held) != _place(facts):
        raise UsageError(
            "the results that are there come from another machine or other versions",
            where=str(path),
            todo="move the file away, or choose another with --out",
        )
    cases: dict[str, Any] = held["cases"]
    return cases


def _place(facts: Mapping[str, Any]) -> Any:
    """What has to be equal. Processors of one name differ in their caches."""
    return facts["machine"]["processor"], facts["machine"].get("target"), facts["versions"]


def is_done(case: Case, held: Mapping[str, Any], at: str) -> bool:
    """Whether the results hold this case, whole and of this commit. Results that were written make a checkout dirty,
    so whether it is does not count.
    """
    row = held.get(case.key, {"failed": "not measured"})
    there = "failed" not in row and set(case.engines) <= set(row["engines"])
    return there and str(row["commit"]).removesuffix("-dirty") == at.removesuffix("-dirty")


def write(path: Path, facts: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Replace the results, in one step: a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps({**facts, "cases": dict(sorted(measured.items()))}, indent=1) + "\n")
    fresh.replace(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.partition("\n")[0])
    models, others = _chosen(NAMES, "model"), _chosen(OTHERS, "engine")
    parser.add_argument("--models", type=models, default=NAMES, help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--others", type=others, default=OTHERS, help=f"of {', '.join(OTHERS)}; all by default")
    parser.add_argument("--threads", type=_numbers, default=(1, 2), metavar="N,...", help="1,2 by default")
    parser.add_argument("--batch", type=_numbers, default=(1, 8), metavar="N,...", help="1,8 by default")
    parser.add_argument("--rounds", type=int, default=12, help="how often each engine has its turn")
    parser.add_argument("--dynamic", action="store_true", help="at batch 1 also ours with a batch that is left free")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that are there from this commit")
    parser.add_argument("--table", action="store_true", help="print tables of all results at the end")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    return parser.parse_args(arguments)


def _chosen(known: Sequence[str], kind: str) -> Any:
    def parse_names(text: str) -> tuple[str, ...]:
        names = tuple(filter(None, text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {kind} {unknown[0]!r}; there are {', '.join(known)}")
        return names

    return parse_names


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("a number below one")
    return numbers


def _line(case: Case, row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{case.key}: failed: {row['failed']}"
    shown = []
    for name, engine in row["engines"].items():
        shown.append(f"{name} " + ("failed" if "failed" in engine else f"{engine['median_ms']:.2f} ms"))
    return f"{case.key}: {', '.join(shown)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen cases; 1 if one of them failed as a whole."""
    options = parse(arguments)
    at = commit()
    facts = {"machine": machine(), "versions": versions(*PACKAGES)}
    try:
        measured = earlier(options.out, facts)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    failed = False
    for case in cases(options):
        if options.resume and is_done(case, measured, at):
            continue
        row = run_apart(case) | {"commit": at}
        failed |= "failed" in row
        measured[case.key] = row
        write(options.out, facts, measured)
        print(_line(case, row), file=sys.stderr, flush=True)
    if options.table and options.out.exists():
        print_tables(json.loads(options.out.read_text()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
