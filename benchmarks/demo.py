"""The main job on real input: two pretrained models, optimised, compiled and compared with their originals.

PP-LCNet tells how a page is turned (ONNX, unfused batch norms); EfficientNet-Lite0 names what is on a photo (PyTorch,
ImageNet weights). Both are rewritten by the `exact` preset, compiled by TVM for this machine, and run on rendered
pages and on photos, beside ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import graphopt as go
from benchmarks import corpora
from benchmarks.efficientnet_lite import class_names, photo, pretrained
from benchmarks.machine import machine, versions
from benchmarks.pages import ROTATIONS, orientation_input, page
from graphopt.analysis.cost import cost
from graphopt.backend import Timing, build
from graphopt.check import relative_error

__all__ = ["main"]

PHOTOS = ("coffee", "chelsea", "flower", "china")
ROUNDS = 20
PAUSE_SECONDS = 0.1
THREADS = 2


@dataclass(frozen=True)
class Job:
    """A model, its inputs (one batch of one each) and how to read its output."""

    title: str
    source: str
    model: go.Model
    names: list[str]
    inputs: list[torch.Tensor]
    label: Callable[[torch.Tensor], str]


@dataclass(frozen=True)
class Result:
    """What became of a job. Errors are relative to the largest output of the original."""

    title: str
    source: str
    operators: tuple[int, int]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    edits: dict[str, int]
    error_after_passes: float
    error_compiled: float
    labels: list[tuple[str, str, str]]
    optimise_seconds: float
    build_seconds: float
    milliseconds: dict[str, tuple[float, float, float]]


def orientation() -> Job:
    """PP-LCNet on rendered pages, one in each rotation."""
    model = go.load(corpora.path("pp-lcnet"))
    inputs = [torch.from_numpy(orientation_input(page(seed, turn))) for seed, turn in enumerate(ROTATIONS)]
    names = [f"page turned by {turn}" for turn in ROTATIONS]

    def label(output: torch.Tensor) -> str:
        return f"{ROTATIONS[int(output.argmax())]} degrees ({float(output.max()):.2f})"

    return Job("PP-LCNet, page orientation", "ONNX", model, names, inputs, label)


def classification() -> Job:
    """EfficientNet-Lite0 on photos."""
    net, words = pretrained().eval(), class_names()
    inputs = [photo(corpora.path(name)) for name in PHOTOS]
    model = go.capture(net, (inputs[0],), dynamic={0: {0: "batch"}})

    def label(output: torch.Tensor) -> str:
        best = output.softmax(-1).max(-1)
        return f"{words[int(best.indices)].split(',')[0]} ({float(best.values):.2f})"

    return Job("EfficientNet-Lite0, ImageNet", "PyTorch", model, list(PHOTOS), inputs, label)


def do(job: Job, say: Callable[[str], None]) -> Result:
    """Optimise, compile, run and time one job."""
    say(f"{job.title}: optimising")
    start = time.perf_counter()
    small, reports = go.run(job.model, "exact")
    optimised = time.perf_counter() - start
    say(f"{job.title}: compiling for this CPU")
    start = time.perf_counter()
    library = build(small, target="cpu", threads=THREADS)
    built = time.perf_counter() - start
    rival = build(job.model, target="cpu", backend="onnxruntime", threads=THREADS)
    say(f"{job.title}: running")
    with torch.no_grad():
        before = [_only(job.model(x)) for x in job.inputs]
        after = [_only(small(x)) for x in job.inputs]
        compiled = [_only(library(x)) for x in job.inputs]
    edits: dict[str, int] = {}
    for report in reports:
        if report.edits:
            edits[report.name] = edits.get(report.name, 0) + len(report.edits)
    old, new = (cost(model).at(**dict.fromkeys(model.signature.ranges, 1)) for model in (job.model, small))
    return Result(
        job.title,
        job.source,
        (_operators(job.model), _operators(small)),
        (int(old.macs), int(new.macs)),
        (int(old.parameters), int(new.parameters)),
        edits,
        max(relative_error(a, b) for a, b in zip(after, before, strict=True)),
        max(relative_error(a, b) for a, b in zip(compiled, before, strict=True)),
        [(name, job.label(a), job.label(b)) for name, a, b in zip(job.names, before, compiled, strict=True)],
        optimised,
        built,
        interleaved({"graphopt (TVM)": library, "ONNX Runtime": rival}, job.inputs[0]),
    )


def interleaved(artifacts: dict[str, Any], x: torch.Tensor) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles in milliseconds, the artifacts taking turns round by round.

    Before each turn a pause: the threads of the one before spin for a while, on the cores that the next one needs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in artifacts}
    for _ in range(ROUNDS):
        for name, artifact in artifacts.items():
            time.sleep(PAUSE_SECONDS)
            timing: Timing = artifact.bench(x, rounds=1, warmup=1)
            seconds[name].append(timing.median * 1000)
    return {
        name: tuple(float(q) for q in np.quantile(rounds, (0.5, 0.25, 0.75)))  # type: ignore[misc]  # three numbers
        for name, rounds in seconds.items()
    }


def _operators(model: go.Model) -> int:
    return sum(node.op == "call_function" for node in model.graph.nodes)


def _only(output: Any) -> torch.Tensor:
    """The one tensor that a classifier returns, whatever it is wrapped in."""
    (tensor,) = (
        output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else [output]
    )
    return torch.as_tensor(tensor)


def show(result: Result, console: Console) -> None:
    """Print the tables of one model."""
    table = Table(title=f"{result.title} ({result.source})", title_justify="left", header_style="bold")
    for column in ("", "original", "optimised"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (old, new) in (("operators", result.operators), ("MACs", result.macs), ("parameters", result.parameters)):
        table.add_row(name, f"{old:,}", f"{new:,}")
    console.print(table)
    done = ", ".join(f"{name} {count}" for name, count in result.edits.items())
    console.print(f"  edits: {done}; {result.optimise_seconds:.1f} s, verified and checked after every pass")
    console.print(
        f"  largest error: {result.error_after_passes:.1e} of the largest output after the passes, "
        f"{result.error_compiled:.1e} compiled ({result.build_seconds:.0f} s)"
    )
    labels = Table("input", "original says", "compiled library says", "", header_style="bold")
    for name, before, after in result.labels:
        same = before.split(" (")[0] == after.split(" (")[0]
        labels.add_row(name, before, after, "[green]same[/]" if same else "[red]differs[/]")
    console.print(labels)
    speed = Table("one image, two threads", "median ms", "quartiles", header_style="bold")
    for name, (median, low, high) in result.milliseconds.items():
        speed.add_row(name, f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(speed)
    console.print()


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; exit code 1 when a label or the numbers changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    console = Console()
    results = []
    for make in (orientation, classification):
        with console.status("loading (the first time, fetching) the model") as status:
            result = do(make(), lambda text: status.update(text))
        show(result, console)
        results.append(result)
    sound = all(
        result.error_compiled < 1e-4 and all(a.split(" (")[0] == b.split(" (")[0] for _, a, b in result.labels)
        for result in results
    )
    console.print(
        "[bold green]Both models were rewritten and compiled, and say the same as before.[/]"
        if sound
        else "[bold red]A result changed.[/]"
    )
    if options.json:
        facts = {"machine": machine(), "versions": versions("graphopt", "torch", "apache-tvm", "onnxruntime")}
        options.json.write_text(
            json.dumps(facts | {"results": [asdict(result) for result in results]}, indent=1) + "\n"
        )
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
