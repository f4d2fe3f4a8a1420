"""Accuracy after pruning, against Torch-Pruning and only-train-once, with the same fine-tuning for all.

    python -m benchmarks.pruning                        everything, into benchmarks/results/pruning.json and the page
    python -m benchmarks.pruning --data cifar10 --nets resnet vgg
    python -m benchmarks.pruning --worker 0/2           every other case; run 1/2 beside it, then once without
    python -m benchmarks.pruning --table                the tables in docs/pruning_accuracy.md alone

Small nets, trained by `benchmarks.baselines`, are brought to a part of their multiply-accumulates, or, those for
CIFAR-10, of the latency of their compiled code with one thread and one image: give every worker a core of its own.
`before` is the test accuracy right after that, `after` the one after 200 steps of fine-tuning (128 images each, SGD or
AdamW along a cosine, equal for all). Of Torch-Pruning all criteria are looked at without fine-tuning; the two with the
highest accuracy, and `magnitude`, are fine-tuned. Seeds choose the calibration images (512, of the training part), and
the order and the augmentation of the fine-tuning. `latency` is that of the first seed's net. Cases that are done are
kept in the user's cache: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch

import graphopt as go
from benchmarks.baselines import BATCH, DEVICE, accuracy, baseline, fast_dtype, optimizer_for
from benchmarks.images import DATA, Images, Shuffled, images
from benchmarks.machine import commit, machine, versions
from benchmarks.pruning_methods import METHODS, Budget, Task, Unsupported, macs, only_train_once
from benchmarks.pruning_table import PAGE, RESULTS, page
from benchmarks.small_nets import NETS
from graphopt.cpus import processor
from graphopt.train import finetune

BUDGETS: tuple[tuple[Budget, float], ...] = (("macs", 0.5), ("macs", 0.25), ("latency", 0.5))
SEEDS = (0, 1, 2)
STEPS = 200
RATE = 0.2
"""Of the learning rate of a training from scratch."""
OTO = "only-train-once hesso"


@dataclass(frozen=True)
class Case:
    data: str
    net: str
    budget: Budget
    part: float
    method: str
    seed: int

    @property
    def file(self) -> Path:
        asked = f"{self.part}" if self.budget == "macs" else f"{self.budget}-{self.part}"
        folder = platformdirs.user_cache_path("graphopt") / "pruning" / f"{self.data}-{self.net}-{asked}"
        return folder / f"{self.method.replace(' ', '-')}-{self.seed}.json"

    @property
    def row(self) -> dict[str, Any] | None:
        """What was measured, if it was."""
        return json.loads(self.file.read_text()) if self.file.exists() else None

    def keep(self, row: dict[str, Any]) -> dict[str, Any]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(row) + "\n")
        return row


def task_of(case: Case, data: Images) -> Task:
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(case.seed))
    chosen = order[: 4 * BATCH].split(BATCH)
    device = torch.device("cpu") if case.budget == "latency" and case.method != OTO else DEVICE
    calibration = [(data.train[part].to(device), data.train_classes[part].to(device)) for part in chosen]
    return Task(baseline(case.data, case.net)[0].to(device), case.part, calibration, case.seed, case.budget)


def tuning(case: Case, data: Images) -> dict[str, Any]:
    """What fine-tuning is like, but for its optimizer."""
    shift = 4 if data.train.shape[1] == 3 else 2
    batches = Shuffled(data, BATCH, case.seed + 1, shift=shift, limit=STEPS * BATCH)
    return {"data": batches, "autocast": fast_dtype(case.net)}


def screened(case: Case, data: Images) -> float:
    """Accuracy without fine-tuning on some of the test images, of a criterion with the first seed."""
    first = replace(case, seed=0)
    look = replace(first, method=f"{case.method} look")
    if (row := look.row) is None:
        some = Images(data.train, data.train_classes, data.test[:2000], data.test_classes[:2000])
        try:
            row = {"before": accuracy(METHODS[case.method](task_of(first, data)).eval(), some)}
        except Unsupported as error:
            row = {"before": 0.0, "refused": str(error)}
        look.keep(row)
    return float(row["before"])


def rivals(case: Case, data: Images) -> list[str]:
    case = replace(case, budget="macs", part=0.5) if case.budget == "latency" else case
    names = [name for name in METHODS if name.startswith("torch-pruning") and "random" not in name]
    ranked = sorted(names, key=lambda name: -screened(replace(case, method=name), data))
    return list(dict.fromkeys([*ranked[:2], "torch-pruning magnitude"]))


def measured(case: Case, data: Images) -> dict[str, Any]:
    task = task_of(case, data)
    known = baseline(case.data, case.net)[1]
    start = time.perf_counter()
    try:
        if case.method == OTO:
            small, row = _only_train_once(case, task, data)
        else:
            small = METHODS[case.method](task)
            seconds = time.perf_counter() - start
            _callable(small).to(DEVICE, memory_format=torch.channels_last)
            row = {"before": accuracy(_callable(small.eval()), data), "seconds": seconds}
            start = time.perf_counter()
            finetune(small, optimizer=optimizer_for(small, case.net, RATE), **tuning(case, data))
            row["tuning seconds"] = time.perf_counter() - start
    except Unsupported as error:
        return {"refused": str(error)}
    if case.budget == "latency":
        row |= {"latency": task.latency(small), "processor": processor()}
    return row | {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "",
        "trained": known["accuracy"],
        "after": accuracy(_callable(small.eval()), data),
        "macs": macs(small, task.example) / macs(task.module, task.example),
        "parameters": _count(small) / _count(task.module),
    }


def _only_train_once(case: Case, task: Task, data: Images) -> tuple[Any, dict[str, Any]]:
    """It takes a part of its groups, not of the multiply-accumulates: for the first seed that part is searched for."""
    options: dict[str, Any] = {"variant": "sgd", "lr": 0.1 * RATE, "first_momentum": 0.9, "weight_decay": 5e-4}
    first = replace(case, seed=0).row if case.seed else None
    sparsity = float(first["sparsity"]) if first and "sparsity" in first else 1 - case.part**0.5
    for _ in range(1 if case.seed else 4):
        start = time.perf_counter()
        small = only_train_once(task, sparsity, options, tuning(case, data))
        row = {"before": None, "seconds": time.perf_counter() - start, "sparsity": sparsity}
        left = task.left(small)
        if abs(left - case.part) < 0.02:
            break
        # What is left falls about as the square of the part of the groups that stays.
        sparsity = min(0.95, max(0.05, 1 - (1 - sparsity) * (case.part / left) ** 0.5))
    return small, row


def _callable(model: Any) -> Any:
    return model.module if isinstance(model, go.Model) else model


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Of every net all seeds of all methods, as far as they are fine-tuned."""
    for budget, part in BUDGETS:
        for data in options.data if budget == "macs" else {"cifar10"} & set(options.data):
            for net in options.nets:
                first = Case(data, net, budget, part, "graphopt", 0)
                methods = ["graphopt", *rivals(first, images(data))]
                for method in methods if budget == "latency" else [*methods, OTO]:
                    yield from (replace(first, method=method, seed=seed) for seed in SEEDS)


def timed(case: Case) -> None:
    """Measure the latency of a net that was made for a budget of multiply-accumulates, before its fine-tuning.

    only-train-once has no net then."""
    look = replace(case, method=f"{case.method} latency")
    if look.row is None and case.method != OTO and "refused" not in (case.row or {}):
        task = task_of(case, images(case.data))
        row = look.keep({"latency": task.latency(METHODS[case.method](task)), "processor": processor()})
        print(case.data, case.net, case.part, case.method, row, flush=True)


def gathered(options: argparse.Namespace) -> dict[str, Any]:
    """All rows that are in the cache."""
    nets: dict[str, Any] = {}
    for data in DATA:
        for net in NETS:
            for budget, part in BUDGETS:
                found: dict[str, Any] = {}
                for method in ("graphopt", OTO, *METHODS):
                    first = Case(data, net, budget, part, method, 0)
                    rows = [row for seed in SEEDS if (row := replace(first, seed=seed).row) is not None]
                    look, time = (replace(first, method=f"{method} {what}").row for what in ("look", "latency"))
                    if rows or look:
                        found[method] = {"seeds": rows, "look": look} | (time or {})
                if found:
                    nets.setdefault(f"{data} {net}", {})[f"{budget} {part}"] = found
    return {
        "machine": machine(),
        "versions": versions("torch-pruning", "only-train-once"),
        "commit": commit(),
        "steps": STEPS,
        "nets": nets,
    }


def run(case: Case) -> None:
    if case.row is None:
        row = case.keep(measured(case, images(case.data)))
        print(case.data, case.net, case.budget, case.part, case.method, case.seed, row, flush=True)
    if case.budget == "macs" and case.seed == 0:
        timed(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--worker", default="0/1", metavar="K/N", help="take every Nth case only")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    worker, workers = map(int, options.worker.split("/"))
    for index, case in enumerate(() if options.table else cases(options)):
        if (index // len(SEEDS)) % workers == worker:
            run(case)
    if workers == 1:
        if not options.table:
            RESULTS.write_text(json.dumps(gathered(options), indent=1) + "\n")
        PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
