"""Accuracy against measured latency: merging layers, pruning channels, and both, with the same fine-tuning for all.

    python -m benchmarks.merging                        everything, into benchmarks/results/merging.json and the page
    python -m benchmarks.merging --nets mobilenet --parts 0.6
    python -m benchmarks.merging --table                the table in docs/merging.md alone

The small nets of `benchmarks.baselines` are brought to parts of the latency of their compiled code with one thread and
one image.
`before` is the test accuracy right after that, `after` the one after the fine-tuning of `benchmarks.pruning`, and
`again` the latency of the fine-tuned net, compiled anew. `one budget` is `compress` over layers and widths. The
MobileNet is fine-tuned fifteen times as long as well. Cases that are done are kept in the user's cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

import graphopt as go
from benchmarks.baselines import DEVICE, accuracy, baseline, optimizer_for
from benchmarks.images import images
from benchmarks.machine import commit, machine, versions
from benchmarks.merging_table import PAGE, RESULTS, page
from benchmarks.pruning import RATE, Case, task_of, tuning
from benchmarks.pruning_methods import Task
from graphopt.cpus import processor
from graphopt.solve import BudgetError
from graphopt.train import finetune

DATA = "cifar10"
NETS = ("mobilenet", "resnet", "vgg")
PARTS = (0.8, 0.6)
SEEDS = (0, 1, 2)
METHODS = {
    "merge": "merge-layers{{latency={part},threads=1,seed={seed}}}",
    "merge, two stages, tuned": "merge-layers{{latency={part},threads=1,plan=two-stage,tune=1,seed={seed}}}",
    "prune": "prune-channels{{latency={part},threads=1,seed={seed}}}",
    "merge and prune": "merge-layers{{latency={root},threads=1,seed={seed}}},"
    "prune-channels{{latency={root},threads=1,seed={seed}}}",
    "one budget": "compress{{latency={part},threads=1,ways=merge-layers;prune-channels,seed={seed}}}",
}
"""Pipelines; `root` is the square root of the part, so that both together reach it. The second one makes the choices of
Kim et al. (2023): importance by training every candidate, and the two-stage program."""

NOTHING = "dead-code"

LONGER = {f"{method}, tuned longer": pipeline for method, pipeline in {**METHODS, "nothing": NOTHING}.items()}
"""Methods with `EPOCHS` times as many steps, which are about as many as the net was trained with, for one net at one
part of its latency; and the net as it was, with those steps."""
WHERE_LONGER, EPOCHS = ("mobilenet", 0.6), 15


@dataclass(frozen=True)
class Run:
    net: str
    part: float
    method: str
    seed: int

    @property
    def file(self) -> Path:
        name = self.method.replace(",", "").replace(" ", "-")
        return platformdirs.user_cache_path("graphopt") / "merged" / f"{self.net}-{self.part}-{name}-{self.seed}.json"

    @property
    def row(self) -> dict[str, Any] | None:
        return json.loads(self.file.read_text()) if self.file.exists() else None

    def keep(self, row: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(row) + "\n")


def measured(run: Run) -> dict[str, Any]:
    data = images(DATA)
    case = Case(DATA, run.net, "latency", run.part, "graphopt", run.seed)
    task = task_of(case, data)
    pipeline = (METHODS | LONGER)[run.method]
    text = pipeline.format(part=run.part, root=round(run.part**0.5, 4), seed=run.seed)
    start = time.perf_counter()
    try:
        small, passes = made(task, text)
    except BudgetError as error:
        return {"refused": error.what}
    seconds = time.perf_counter() - start
    small.module.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    row: dict[str, Any] = {"seconds": seconds, "passes": passes, "before": accuracy(small.module, data)}
    epochs = EPOCHS if run.method in LONGER else 1
    finetune(small, epochs=epochs, optimizer=optimizer_for(small, run.net, RATE), **tuning(case, data))
    return row | {
        "trained": baseline(DATA, run.net)[1]["accuracy"],
        "after": accuracy(small.module, data),
        "again": task.latency(small),
        "processor": processor(),
        "layers": sum(str(node.target) == "aten.conv2d.default" for node in small.graph.nodes),
    }


def made(task: Task, text: str) -> tuple[go.Model, str]:
    """What a pipeline makes of the net, and the passes among which it has divided its budget."""
    model = go.capture(deepcopy(task.module).eval(), (task.example,), dynamic={0: {0: "batch"}})
    small, reports = go.run(model, text, calib=[(x,) for x, _ in task.calibration], check=False)
    return small, reports[-1].findings.get("passes", text)


def runs(options: argparse.Namespace) -> Iterator[Run]:
    for net in options.nets:
        for part in options.parts:
            for method in methods_of(net, part):
                if method in options.methods or not options.methods:
                    yield from (Run(net, part, method, seed) for seed in SEEDS[: options.seeds])


def methods_of(net: str, part: float) -> list[str]:
    return [*METHODS, *(LONGER if (net, part) == WHERE_LONGER else ())]


def gathered() -> dict[str, Any]:
    """All rows that are in the cache."""
    nets: dict[str, Any] = {}
    for net in NETS:
        for part in PARTS:
            for method in methods_of(net, part):
                rows = [row for seed in SEEDS if (row := Run(net, part, method, seed).row) is not None]
                if rows:
                    nets.setdefault(net, {}).setdefault(str(part), {})[method] = rows
    return {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": nets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--parts", nargs="*", type=float, default=list(PARTS))
    parser.add_argument("--methods", nargs="*", default=[], help="some of them, by name")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for run in () if options.table else runs(options):
        if run.row is None:
            run.keep(measured(run))
            print(run, run.row, flush=True)
    if not options.table:
        RESULTS.write_text(json.dumps(gathered(), indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
