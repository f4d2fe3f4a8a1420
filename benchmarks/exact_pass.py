"""What the exact passes cost: time and memory, verification and the numeric check included.

    python -m benchmarks.exact_pass                      all cases into benchmarks/results/exact_pass.json
    python -m benchmarks.exact_pass wide --profile 30    one case, and the 30 functions that take most of its time

Every case is saved to a file first and measured in a process of its own that does nothing else: it loads the file,
reads every weight once, notes its memory, runs the pipeline, and notes the highest memory in between. Peak memory
counts the weights that were loaded, because the original stays usable: `1 + growth / weights`. Activations of the
numeric check, and the graph itself, count too, so small weights give large ratios; `wide` is the case that tells how
many copies of the weights there are.

Goals: efficientnet_b0 under 3 s, 10,000 operators under 20 s, peak memory of `wide` under 2.2 times its weights.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt as go
from benchmarks.long_graph import long_graph
from benchmarks.machine import machine, memory, versions
from benchmarks.torchvision_ops import define_missing
from graphopt.instruments import TimingTree

RESULTS = Path(__file__).parent / "results" / "exact_pass.json"
BATCH = {0: {0: "batch"}}


def efficientnet_b0() -> go.Model:
    """At its own resolution."""
    define_missing()
    import torchvision

    net = torchvision.models.efficientnet_b0(weights=None).eval()
    with torch.no_grad():
        for buffer in net.buffers():  # statistics that make a fold change the weights
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return go.capture(net, (torch.randn(2, 3, 224, 224),), dynamic=BATCH)


def operators_10000() -> go.Model:
    """Something for every pass in each of its 526 blocks."""
    return long_graph(10_000)


def wide() -> go.Model:
    """Half a gigabyte of weights in few operators, every one of which is folded into or merged."""
    return go.capture(nn.Sequential(*(WideBlock() for _ in range(10))).eval(), (torch.randn(2, 2048),), dynamic=BATCH)


class WideBlock(nn.Module):
    """A linear with a batch norm, and two linears that can be one."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.first(x)))
        return torch.tanh(self.left(x)) * self.right(x)


CASES = {case.__name__: case for case in (efficientnet_b0, operators_10000, wide)}


def measure(path: Path, pipeline: str, profile: int) -> dict[str, Any]:
    """Run the pipeline on the model in a file."""
    model = go.load(path)
    for _, tensor in model.params.items():
        tensor.detach().sum()
    gc.collect()
    weights = sum(entry.tensor.untyped_storage().nbytes() for entry in model.params.entries())
    tree, profiler = TimingTree(), cProfile.Profile()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is now this
    wall, cpu = time.perf_counter(), time.process_time()
    if profile:
        profiler.enable()
    result, reports = go.run(model, pipeline, instruments=[tree])
    profiler.disable()
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    growth = memory("VmHWM") - before
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(profile)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats(profile)
    return {
        "operators": _operators(model),
        "operators_after": _operators(result),
        "weight_mb": round(weights / 1e6, 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "growth_mb": round(growth / 1e6, 1),
        "peak_over_weights": round(1 + growth / weights, 2),
        "passes_run": len(reports),
        "edits": {r.name: sum(len(s.edits) for s in reports if s.name == r.name) for r in reports},
        "largest_error": max((r.check.error for r in reports if r.check), default=0.0),
        "timing": str(tree).splitlines(),
    }


def _operators(model: go.Model) -> int:
    return sum(node.op == "call_function" for node in model.graph.nodes)


def measure_apart(name: str, pipeline: str, profile: int) -> dict[str, Any]:
    """Build a case here, measure it in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
        path = Path(folder) / f"{name}.gopt"
        CASES[name]().save(path)
        command = [sys.executable, "-m", "benchmarks.exact_pass", "--file", str(path), "--pipeline", pipeline]
        command += ["--profile", str(profile)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Measure the named cases, or all; a partial run replaces only its own part of the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact_pass", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--pipeline", default="exact")
    parser.add_argument("--profile", type=int, default=0, metavar="LINES")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; cases are {', '.join(CASES)}")
    if options.file:
        print(json.dumps(measure(options.file, options.pipeline, options.profile)))
        return 0
    measured = {}
    for name in options.cases or CASES:
        measured[name] = row = measure_apart(name, options.pipeline, options.profile)
        took = f"{row['seconds']:7.2f} s ({row['cpu_seconds']:.2f} of processor)"
        print(f"{name:18} {took} {row['peak_over_weights']:7.2f} x weights", file=sys.stderr)
        print("\n".join(row["timing"]), file=sys.stderr)
    if options.pipeline == "exact" and not options.profile:
        earlier = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
        results = {"machine": machine(), "versions": versions(), "cases": {**earlier, **measured}}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
