"""`graphopt.tune`: extract, search, and measure the model as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.backend import check_threads
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.tune.batches import Bench
from graphopt.backends.tvm.tune.database import Database, Environment, Outcome
from graphopt.backends.tvm.tune.local import BUILDER, LocalMeasurer, divided_cores
from graphopt.backends.tvm.tune.search import Progress, Search
from graphopt.backends.tvm.tune.shipped import add_shipped
from graphopt.backends.tvm.tune.tasks import Tasks, extract
from graphopt.backends.tvm.tune.whole import settled
from graphopt.backends.tvm.tune.worker import Worker
from graphopt.errors import UnsupportedError, UsageError
from graphopt.target import Target, why_not_here

if TYPE_CHECKING:
    from graphopt.backends.tvm.ceilings import Ceilings
    from graphopt.backends.tvm.tune.measuring import Measurer
    from graphopt.model import Model

__all__ = ["Tuning", "tune"]


@dataclass(frozen=True)
class Tuning:
    """What came of it.

    Attributes:
        outcome: what was kept for the model as a whole; None where the target is not this machine.
        tasks: what there was to tune.
        candidates, failed: measured in this search, and those of them that do not count.
        interrupted: whether it ended before its time.
        ignored: one line on measurements that do not count here.
    """

    outcome: Outcome | None
    tasks: Tasks
    candidates: int
    failed: int
    interrupted: bool
    ignored: str | None


def tune(
    model: Model,
    target: Target | str = "cpu",
    *,
    database: str | os.PathLike[str],
    budget: float = 600.0,
    threads: int | None = None,
    exact_float: bool = False,
    inputs: Sequence[Any] | None = None,
    measurer: Measurer | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Tuning:
    """Measure choices for the kernels of a model, and keep all of them in a database for `graphopt.build(tuned=...)`.

    An interrupt (Ctrl-C) ends the search early; a second one ends everything. Nothing that was measured is lost.

    Args:
        database: a folder, or an SQLite file, made where there is none; a later search goes on from it.
        budget: seconds of the search; extracting tasks before it and measuring the whole model after it come on top.
        inputs: to run the whole model on; seeded ones where none are given.
        measurer: another machine to measure on.

    Raises:
        UsageError: for a target whose code does not run here, or a database that cannot be used.
        UnsupportedError: naming what the backend cannot run.
    """
    where = Target.parse(target) if isinstance(target, str) else target
    count = where.cores if threads is None else threads
    check_threads(count)
    _check_measurable(where, measurer)
    machine = Machine.of(where, count, exact=exact_float)
    on, others = divided_cores(count)
    builders = [Worker(BUILDER, (core,)) for core in others]
    known = Database(database, Environment.of(where, count, exact=exact_float))
    try:
        add_shipped(known)
        tasks = extract(model, where, machine)
        ceilings = _ceilings(count) if measurer is None else None
        for builder in builders:
            builder.start()
        place = json.dumps(where.to_json()), count, exact_float
        own = LocalMeasurer(on) if measurer is None else measurer
        with Bench(place, builders, own, on if measurer is None else (), tasks.weights) as bench:
            search, interrupted = Search(tasks, known, machine, bench, ceilings), False
            try:
                search.run(budget, report)
            except KeyboardInterrupt:
                interrupted = True
        outcome = None
        if why_not_here(where) is None:
            outcome = _settled(model, where, machine, search, inputs)
            known.add_outcome(outcome)
        return Tuning(outcome, tasks, search.candidates, search.failed, interrupted, known.ignored())
    finally:
        known.close()


def _check_measurable(target: Target, measurer: Measurer | None) -> None:
    if target.kind == "cuda":
        raise UnsupportedError("choices are measured for CPUs so far", todo="name a CPU target")
    foreign = why_not_here(target)
    if foreign is not None and measurer is None:
        raise UsageError(
            f"code for '{target.cpu or target.arch}' cannot be measured here",
            why=foreign,
            todo="tune on a machine of that kind, or on a fleet of them: --tracker HOST:PORT --key NAME",
        )


def _settled(model: Model, where: Target, machine: Machine, search: Search, inputs: Sequence[Any] | None) -> Outcome:
    from graphopt.sample import usual_inputs

    tensors = usual_inputs(model) if inputs is None else list(inputs)
    return settled(model, where, machine, search.tasks, search.tuned(), tensors)


def _ceilings(threads: int) -> Ceilings:
    from graphopt.backends.tvm.ceilings import measured_ceilings

    return measured_ceilings(threads)
