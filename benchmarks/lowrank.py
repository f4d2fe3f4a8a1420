"""Accuracy against size: low-rank substitution, ALDS, uniform SVD and Greenformer's rule, with the same fine-tuning.

    python -m benchmarks.lowrank                        everything, into benchmarks/results/lowrank.json and the page
    python -m benchmarks.lowrank --nets vit --parts 0.5 --seeds 1
    python -m benchmarks.lowrank --table                the table in docs/lowrank.md alone

The small nets of `benchmarks.baselines` are brought to parts of their parameters. `before` is the test accuracy right
after that, `after` the one after the fine-tuning of `benchmarks.pruning`, `macs` and `latency` what is left of those:
the latency of compiled code, with one thread and one image. Cases that are done are kept in the user's cache: a run
that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from benchmarks.baselines import accuracy, baseline, optimizer_for
from benchmarks.images import images
from benchmarks.lowrank_methods import METHODS, parameters
from benchmarks.lowrank_table import PAGE, RESULTS, page
from benchmarks.machine import commit, machine, versions
from benchmarks.pruning import Case, task_of, tuning
from benchmarks.pruning_methods import macs
from graphopt.solve import BudgetError
from graphopt.train import finetune

DATA = "cifar10"
NETS = ("vit", "resnet", "vgg")
PARTS = (0.5, 0.3)
SEEDS = (0, 1, 2)
RATES = {"vit": 0.2, "resnet": 0.05, "vgg": 0.05}
"""Of the learning rate of a training from scratch: there is no norm between factors, and with more than this some of
all methods diverge."""


@dataclass(frozen=True)
class Run:
    net: str
    part: float
    method: str
    seed: int

    @property
    def file(self) -> Path:
        name = self.method.replace(",", "").replace(" ", "-")
        return platformdirs.user_cache_path("graphopt") / "lowrank" / f"{self.net}-{self.part}-{name}-{self.seed}.json"

    @property
    def row(self) -> dict[str, Any] | None:
        return json.loads(self.file.read_text()) if self.file.exists() else None

    def keep(self, row: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(row) + "\n")


def measured(run: Run, *, latency: bool) -> dict[str, Any]:
    data = images(DATA)
    case = Case(DATA, run.net, "macs", run.part, "graphopt", run.seed)
    task = task_of(case, data)
    start = time.perf_counter()
    try:
        small = METHODS[run.method](task.module, run.part, [(x,) for x, _ in task.calibration], run.seed)
    except BudgetError as error:
        return {"refused": error.what}
    row = {
        "seconds": time.perf_counter() - start,
        "before": accuracy(small, data),
        "parameters": parameters(small) / parameters(task.module),
        "macs": macs(small, task.example) / macs(task.module, task.example),
    }
    if latency:
        row["latency"] = task.latency(small)
    small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    finetune(small, optimizer=optimizer_for(small, run.net, RATES[run.net]), **tuning(case, data))
    return row | {"trained": baseline(DATA, run.net)[1]["accuracy"], "after": accuracy(small, data)}


def runs(options: argparse.Namespace) -> Iterator[Run]:
    for net in options.nets:
        for part in options.parts:
            for method in options.methods:
                yield from (Run(net, part, method, seed) for seed in SEEDS[: options.seeds])


def gathered() -> dict[str, Any]:
    """All rows that are in the cache."""
    nets: dict[str, Any] = {}
    for net in NETS:
        for part in PARTS:
            for method in METHODS:
                rows = [row for seed in SEEDS if (row := Run(net, part, method, seed).row) is not None]
                if rows:
                    nets.setdefault(net, {}).setdefault(str(part), {})[method] = rows
    return {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": nets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--parts", nargs="*", type=float, default=list(PARTS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--no-latency", action="store_true", help="compile nothing")
    parser.add_argument("--dry", action="store_true", help="leave results and page as they are")
    options = parser.parse_args()
    for run in () if options.table else runs(options):
        if run.row is None:
            run.keep(measured(run, latency=not options.no_latency))
            print(run, run.row, flush=True)
    if options.dry:
        return
    if not options.table:
        RESULTS.write_text(json.dumps(gathered(), indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
