"""What tuning gives, and how fast it is.

    python -m benchmarks.tuning search MODEL ... [--seconds 600] [--threads 2] [--db DIR]
    python -m benchmarks.tuning compare MODEL ... [--threads 2] [--db DIR]
    python -m benchmarks.tuning search twenty --seconds 45
    python -m benchmarks.tuning ship [--threads 2] [--db DIR]
    python -m benchmarks.tuning throughput [--threads 1]
    python -m benchmarks.tuning kills MODEL [--threads 1]

`search` tunes models of the latency benchmark; `compare` builds each with and without what is in the database, has the
two take turns and holds both against the roofline. `ship` makes the measurements that come with the package.
`throughput` counts candidates per second, ours and those of
MetaSchedule's builder and runner on the same functions. `kills` ends a search ten times at random moments. Results go
to `results/tuning.json`; nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import graphopt as go
from benchmarks.latency_models import MORE, NAMES, Subject, build
from benchmarks.machine import machine
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.ceilings import Ceilings, Gauge
from graphopt.backends.tvm.profile import Profile, profile
from graphopt.backends.tvm.tune.database import Database, Environment
from graphopt.backends.tvm.tune.search import Progress
from graphopt.backends.tvm.tune.shipped import worth_shipping, write
from graphopt.backends.tvm.tune.whole import in_turns
from graphopt.target import Target
from graphopt.tools.roofline import least_seconds

RESULTS = Path(__file__).parent / "results" / "tuning.json"
COMPARISONS, ROUNDS = 5, 25

TWENTY = (*NAMES, *MORE)
"""Those of the latency benchmark, and some more."""

SAY_EVERY = 20.0


def record(section: str, key: str, facts: dict[str, Any]) -> None:
    """Add a result to the file."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known["machine"] = machine()
    known.setdefault(section, {})[key] = facts
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(section, key, json.dumps(facts), flush=True)


def ready(name: str) -> tuple[Subject, go.Model]:
    """A model of the latency benchmark after the exact passes."""
    subject = build(name, 1)
    model, _ = go.run(subject.capture(), "exact")
    return subject, model


def search(name: str, threads: int, seconds: float, db: Path) -> None:
    """Tune a model and record what came of it."""
    subject, model = ready(name)
    start, said = time.perf_counter(), [0.0]
    falling: list[list[float]] = []

    def report(progress: Progress) -> None:
        now = time.perf_counter() - start
        if now - said[0] > SAY_EVERY:
            said[0] = now
            ms = [None if s is None else round(s * 1e3, 3) for s in (progress.before, progress.now)]
            print(f"{now:7.1f} s  {progress.candidates} candidates  {ms}  {progress.task}", flush=True)
            if progress.before and progress.now:
                falling.append([round(now, 1), round(progress.now / progress.before, 4)])

    found = go.tune(model, database=db, budget=seconds, threads=threads, inputs=list(subject.args), report=report)
    assert found.outcome is not None
    facts = {
        "threads": threads,
        "budget": seconds,
        "seconds": round(time.perf_counter() - start, 1),
        "tasks": len(found.tasks.known),
        "candidates": found.candidates,
        "failed": found.failed,
        "kernels_kept": len(found.outcome.kernels),
        "algorithms_kept": len(found.outcome.algorithms),
        "dropped": len(found.outcome.dropped),
        "tuned_over_untuned": round(found.outcome.ratio, 4),
        "kernels_now_over_before": falling,
    }
    record("search", f"{name} threads {threads}, {seconds:g} s", facts)


def compare(name: str, threads: int, db: Path) -> None:
    """Build a model with and without measured choices, and time the two in turns."""
    subject, model = ready(name)
    inputs = list(subject.args)
    plain, tuned = (go.build(model, threads=threads, tuned=place) for place in (None, db))
    tuned_, plain_ = _artifact(tuned), _artifact(plain)
    ratios = [in_turns(tuned_, plain_, inputs) for _ in range(COMPARISONS)]
    facts = {
        "tuned": tuned.record["tuned"],
        "tuned_over_untuned": round(statistics.median(ratios), 4),
        "each": [round(ratio, 4) for ratio in ratios],
        "noise": [round(in_turns(plain_, again, inputs), 4) for again in [_artifact(go.build(model, threads=threads))]],
        "untuned": reached(plain_, inputs),
        "tuned_reaches": reached(tuned_, inputs),
    }
    record("compare", f"{name} threads {threads}", facts)


def ship(threads: int, db: Path) -> None:
    """Put what builds of the models that were tuned need into the package."""
    database = Database(db, Environment.of(Target.parse("cpu"), threads, exact=False))
    rows = worth_shipping(database)
    write(rows)
    print({name: len(own) for name, own in rows.items()})


def _artifact(made: Any) -> TvmArtifact:
    assert isinstance(made, TvmArtifact)
    return made


def reached(artifact: TvmArtifact, inputs: list[torch.Tensor]) -> dict[str, Any]:
    """Milliseconds of a call, and the parts of the roofline that the kernels and the whole call reach.

    The kernels' is that of the fastest time of each. That of the whole call is measured round by round, each beside
    the ceilings of its moment, as the clock changes from one second to the next; quartiles of these ratios are told.
    """
    gauge = Gauge(artifact.threads)
    ceilings, found = gauge.measure(7), profile(artifact, inputs, rounds=30)
    kernels = sum(kernel.fastest for kernel in found.kernels)
    whole, taken = [], []
    for _ in range(ROUNDS):
        before = gauge.measure()
        for _ in range(2):  # the ceilings' data leave the caches
            artifact.run(inputs)
        times = [_seconds(artifact, inputs) for _ in range(3)]
        after = gauge.measure()
        now = Ceilings(artifact.threads, (before.flops + after.flops) / 2, (before.bytes + after.bytes) / 2)
        whole.append(allowed(found, now) / statistics.median(times))
        taken += times
    q1, median, q3 = statistics.quantiles(whole, n=4)
    return {
        "ms": round(statistics.median(taken) * 1e3, 3),
        "kernels_ms": round(kernels * 1e3, 3),
        "kernels_reach": round(allowed(found, ceilings) / kernels, 4),
        "call_reaches": [round(part, 4) for part in (q1, median, q3)],
        "gflops_and_gb_per_second": [round(ceilings.flops / 1e9, 1), round(ceilings.bytes / 1e9, 1)],
    }


def allowed(found: Profile, ceilings: Ceilings) -> float:
    """Seconds that a call takes at least, kernel by kernel."""
    return sum(least_seconds(kernel, ceilings) or 0.0 for kernel in found.kernels)


def _seconds(artifact: TvmArtifact, inputs: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    artifact.run(inputs)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "compare", "ship", "throughput", "kills"))
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(TWENTY)}, or twenty")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--db", type=Path, default=Path("build/tuning"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "throughput":
        from benchmarks.tuning_speed import throughput

        for key, facts in throughput(given.threads).items():
            record("throughput", key, facts)
        return
    if given.what == "ship":
        ship(given.threads, given.db)
        return
    if given.what == "kills":
        from benchmarks.tuning_speed import kills

        for name in given.models:
            record("kills", name, kills(name, given.threads))
        return
    for name in TWENTY if given.models == ["twenty"] else given.models:
        if given.what == "search":
            search(name, given.threads, given.seconds, given.db)
        compare(name, given.threads, given.db)


if __name__ == "__main__":
    sys.exit(main())
