"""A search for half of the latency of a trained net, against each of its passes alone.

    python -m benchmarks.search             everything, into benchmarks/results/search.json and .svg, and the page
    python -m benchmarks.search --table     the table in docs/search.md alone

A small net of `benchmarks.baselines`, one thread, one image. Passes calibrate with some images of the training part,
the loss is measured on others of it, and the accuracy on the test part, which the search never sees. Nothing is
fine-tuned. The study is kept in the user's cache: another run goes on with it until there are enough trials.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import platformdirs
import torch

import graphopt as go
from benchmarks.baselines import accuracy, baseline
from benchmarks.images import images
from benchmarks.machine import commit, machine, versions
from graphopt.search import Result, Trial
from graphopt.search.loop import Progress
from graphopt.tools._frontier_plot import frontier_plot

RESULTS = Path(__file__).parent / "results" / "search.json"
PAGE = Path(__file__).parent.parent / "docs" / "search.md"
BEGIN, END = "<!-- begin: python -m benchmarks.search --table -->", "<!-- end -->"
PASSES = "remove-layers{macs=0.4..0.95},prune-channels{latency=0.3..0.95,macs=0.2..0.95},low-rank{macs=0.5..0.95}"
"""Budgets that need few compilations. Without `merge-layers`, whose table of losses takes minutes for every model."""
DATA, NET, GOAL = "fashion", "mobilenet", {"latency": 0.5}
TRIALS, SECONDS, SAMPLES = 40, 420.0, 256


def searched() -> dict[str, Any]:
    data = images(DATA)
    module, known = baseline(DATA, NET)
    model = go.capture(module, (data.train[:1],), dynamic={0: {0: "batch"}})
    calib, valid = ([(x,)] for x in data.train[: 2 * SAMPLES].split(SAMPLES))
    folder = platformdirs.user_cache_path("graphopt") / "searched"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = go.search(
        model, calib=calib, valid=valid, goals=GOAL, passes=PASSES, trials=TRIALS,
        seconds=SECONDS, threads=1, tell=told, storage=f"sqlite:///{folder / f'{DATA}-{NET}.db'}",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    RESULTS.with_suffix(".svg").write_text(frontier_plot(f"the {NET} on {DATA}", result))

    def row(trial: Trial | None) -> dict[str, Any]:
        if trial is None or trial.found is None:
            return {"pipeline": trial and trial.pipeline, "refused": trial and trial.reason}
        small, _ = go.run(model, trial.pipeline, calib=calib)
        return {"pipeline": trial.pipeline, **trial.measures, "accuracy": accuracy(small.module, data)}

    return {
        "machine": machine(),
        "versions": versions("apache-tvm", "optuna"),
        "commit": commit(),
        "net": f"{DATA} {NET}",
        "goal": GOAL,
        "accuracy": known["accuracy"],
        "seconds": seconds,
        "alone": {name: row(trial) for name, trial in first_tries(result).items()},
        "best alone": row(best_of_one_pass(result)),
        "best": row(result.best) | {"verified": result.verified and result.verified.to_json()},
        "search": result.to_json(),
    }


def first_tries(result: Result) -> dict[str, Trial]:
    """By pass, the trial of it alone at the goal."""
    tries = [trial for trial in result.trials if trial.alone]
    return {str(trial.alone): trial for trial in reversed(tries)}


def best_of_one_pass(result: Result) -> Trial | None:
    """The best within the goal of all trials that have one pass, whatever its options."""
    ones = [trial for trial in result.complete if len(list(go.Pipeline.parse(trial.pipeline).passes())) == 1]
    kept = [trial for trial in ones if all(trial.measure(name) <= limit for name, limit in GOAL.items())]
    return min(kept, key=lambda trial: trial.measure("loss"), default=None)


def told(progress: Progress) -> None:
    if progress.last is not None:
        last = progress.last
        print(progress.done, last.pipeline, last.measures if last.found else last.reason, flush=True)


def table(results: dict[str, Any]) -> str:
    lines = ["| tried | latency | size | loss | accuracy | pipeline |", "|---|---:|---:|---:|---:|---|"]
    lines.append(f"| the original | 1 | 1 | 0 | {100 * results['accuracy']:.1f} | |")
    lines += [_row(f"{name} alone", row) for name, row in results["alone"].items()]
    lines.append(_row("the best of one pass", results["best alone"]))
    lines.append(_row("the best of all", results["best"]))
    tried = results["search"]["trials"]
    pruned = sum(one["state"] == "pruned" for one in tried)
    where = results["machine"]
    note = f"{len(tried)} trials, {pruned} of them pruned, in {results['seconds']:.0f} s; accuracy in percent, on test"
    return "\n".join([*lines, "", f"{note} images. {where['processor']}, one thread of {where['cores']} cores."])


def _row(name: str, row: dict[str, Any]) -> str:
    if "latency" not in row:
        return f"| {name} | | | | | refused: {row.get('refused')} |"
    numbers = f"{row['latency']:.3f} | {row['size']:.3f} | {row['loss']:.3f} | {100 * row['accuracy']:.1f}"
    return f"| {name} | {numbers} | `{row['pipeline']}` |"


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its generated part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        RESULTS.write_text(json.dumps(searched(), indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
