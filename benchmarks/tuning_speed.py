"""How many candidates per second are compiled and measured, and what kill -9 does to a search."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from tvm import IRModule, ir
from tvm.s_tir import meta_schedule as ms

import graphopt as go
from benchmarks.latency_models import build
from graphopt.backends.tvm.backend import tvm_target
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.tune.batches import Bench
from graphopt.backends.tvm.tune.database import Database, Environment
from graphopt.backends.tvm.tune.local import BUILDER, LocalMeasurer, divided_cores
from graphopt.backends.tvm.tune.search import Search
from graphopt.backends.tvm.tune.tasks import Task, Tasks, extract
from graphopt.backends.tvm.tune.worker import Worker
from graphopt.target import this_machine

SECONDS = 60.0
TRIALS, PATIENCE = 16, 300.0
"""For MetaSchedule: how many candidates of each function, and seconds until one is given up, on a busy machine too."""
KINDS = ("product", "convolution")
"""Of the functions that both can do: MetaSchedule has no other algorithms, and no kernels of two anchors."""
KILLS = 10
CORES = len(os.sched_getaffinity(0))


def throughput(threads: int) -> dict[str, dict[str, Any]]:
    """Candidates per second on functions of resnet50, by who compiles and measures."""
    model, _ = go.run(build("resnet50", 1).capture(), "exact")
    tasks = extract(model, this_machine(), Machine.of(this_machine(), threads))
    some = [next(task for task in tasks.known.values() if task.kind == kind) for kind in KINDS]
    return {f"ours threads {threads}": _ours(tasks, some, threads), f"MetaSchedule threads {threads}": _theirs(some)}


def _ours(tasks: Tasks, some: list[Task], threads: int) -> dict[str, Any]:
    keys = [task.key for task in some]
    part = Tasks({task.key: task for task in some}, dict.fromkeys(keys, 1), {}, (), "")
    target = this_machine()
    on, cores = divided_cores(threads)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(folder, Environment.of(target, threads, exact=False))
        workers = [Worker(BUILDER, (core,)) for core in cores]
        start, before = time.perf_counter(), processor_seconds()
        with Bench((json.dumps(target.to_json()), threads, False), workers, LocalMeasurer(on), on) as bench:
            search = Search(part, database, Machine.of(target, threads), bench, None)
            search.run(SECONDS)
        passed, used = time.perf_counter() - start, processor_seconds() - before
        database.close()
    return _rate(search.candidates, passed, used) | {"workers_started": sum(worker.starts for worker in workers) + 1}


def _theirs(some: list[Task]) -> dict[str, Any]:
    """Its builder and runner on candidates that its own rules made, which is not counted."""
    target = tvm_target(this_machine())
    builder, runner = (
        ms.builder.LocalBuilder(max_workers=CORES, timeout_sec=PATIENCE),
        ms.runner.LocalRunner(timeout_sec=PATIENCE),
    )
    count, passed, used = 0, 0.0, 0.0
    for task in some:
        candidates = list(_candidates(ir.load_json(task.function), target))
        start, before = time.perf_counter(), processor_seconds()
        built = builder.build([ms.builder.BuilderInput(c.sch.mod, target) for c in candidates])
        jobs = [
            ms.runner.RunnerInput(made.artifact_path, "cpu", candidate.args_info)
            for made, candidate in zip(built, candidates, strict=True)
            if made.error_msg is None
        ]
        results = [future.result() for future in runner.run(jobs)]
        passed += time.perf_counter() - start
        count += sum(result.error_msg is None for result in results)
        used += processor_seconds() - before
    return _rate(count, passed, used)


def _candidates(function: Any, target: Any) -> Iterator[Any]:
    module = IRModule({"main": function.with_attr("global_symbol", "main")})
    context = ms.TuneContext(
        module,
        target=target,
        space_generator="post-order-apply",
        search_strategy="replay-trace",
        rand_state=1,
        num_threads=CORES,
    )
    spaces = context.generate_design_space()
    context.pre_tuning(TRIALS, num_trials_per_iter=TRIALS, design_spaces=spaces)
    yield from context.generate_measure_candidates() or []


def processor_seconds() -> float:
    """What this process and those that it has ended have used; unlike the time of the clock, other processes do not
    change it much."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    running = sum(
        sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True) if child.is_running()
    )
    return sum(used.ru_utime + used.ru_stime for used in found) + running


def _rate(candidates: int, seconds: float, used: float) -> dict[str, Any]:
    return {
        "candidates": candidates,
        "seconds": round(seconds, 1),
        "per_second": round(candidates / seconds, 2),
        "processor_seconds": round(used, 1),
        "per_processor_second": round(candidates / used, 2),
    }


def kills(name: str, threads: int) -> dict[str, Any]:
    """Searches that are killed at random moments, one after the other on one database."""
    chance, seen, lost = random.Random(0), set[str](), 0
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tuning.sqlite"
        command = [sys.executable, "-m", "benchmarks.tuning", "search", name, "--db", folder, "--threads", str(threads)]
        for _ in range(KILLS):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            before = len(seen)
            while len(_rows(file)) <= before and process.poll() is None:  # until it has measured something
                time.sleep(0.2)
            time.sleep(chance.uniform(0, 10))
            seen |= _rows(file)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            now = _rows(file)
            lost += len(seen - now)
            seen |= now
            counts.append(len(seen))
        with sqlite3.connect(file) as opened:
            (sound,) = opened.execute("PRAGMA integrity_check").fetchone()
    return {"kills": KILLS, "measurements_after_each": counts, "lost": lost, "integrity": sound}


def _rows(file: Path) -> set[str]:
    if not file.exists():
        return set()
    with sqlite3.connect(file, timeout=30) as opened:
        try:
            return {str(name) for (name,) in opened.execute("SELECT id FROM measurements")}
        except sqlite3.OperationalError:  # not there yet
            return set()
