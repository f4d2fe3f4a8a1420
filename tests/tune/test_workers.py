"""Workers and batches: what crashes, hangs or is wrong is found, and costs nobody else anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import IRModule, ir, tirx, transform
from tvm import compile as tvm_compile

from graphopt.backends.tvm.backend import tvm_target
from graphopt.backends.tvm.bundle import toolchain
from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices
from graphopt.backends.tvm.pipeline import CPU_CODE
from graphopt.backends.tvm.threads import with_threads
from graphopt.backends.tvm.tune.batches import Batch, Bench
from graphopt.backends.tvm.tune.database import Row
from graphopt.backends.tvm.tune.local import LocalMeasurer, divided_cores
from graphopt.backends.tvm.tune.measuring import Job, Measured, MeasuringFailed, ratios
from graphopt.backends.tvm.tune.runner import _operands
from graphopt.backends.tvm.tune.tasks import Task
from graphopt.backends.tvm.tune.worker import Worker, WorkerFailed
from graphopt.target import this_machine

ODD = "tests.tune.odd_worker"
TASK = Task("key", "product", "", "", "{}", (((4,), "float32", "data"),) * 2, 1, 1)
ONE, TWO, BAD, SLOW = (Choices(steps=n) for n in (1, 2, 8, 4))


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(ODD, (min(os.sched_getaffinity(0)),))
    yield made
    made.stop()


def test_a_worker_answers_and_is_started_once(worker: Worker) -> None:
    for word in ("one", "two", "three"):
        assert worker.ask({"do": word}, 20) == {"got": word, "cores": [min(os.sched_getaffinity(0))]}
    assert worker.starts == 1


def test_a_worker_that_crashes_or_hangs_is_replaced(worker: Worker) -> None:
    for word, status in (("crash", "crash"), ("hang", "timeout")):
        with pytest.raises(WorkerFailed) as failure:
            worker.ask({"do": word}, 2)
        assert failure.value.status == status
        assert worker.ask({"do": "again"}, 20)["got"] == "again"
    assert worker.starts == 3


def test_a_paused_worker_answers_later(worker: Worker) -> None:
    worker.ask({"do": "start"}, 20)
    worker.pause(True)
    with pytest.raises(WorkerFailed, match="no answer"):
        worker.ask({"do": "nothing"}, 0.3)
    worker.ask({"do": "start"}, 20)
    worker.pause(True)
    worker.pause(False)
    assert worker.ask({"do": "awake"}, 20)["got"] == "awake"


def test_workers_die_with_the_process_that_started_them() -> None:
    code = (
        "import sys, time; from graphopt.backends.tvm.tune.worker import Worker\n"
        f"w = Worker('{ODD}'); w.ask({{'do': 'x'}}, 20); w.pause(True)\n"
        "print(w._process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except OSError:
            return
        if state in "ZX":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


class FakeBuilder:
    """Compiles anything but what it cannot."""

    cores = ()

    def __init__(self, bad: Choices | None = None) -> None:
        self.bad, self.asked = bad, 0
        self.paused: list[bool] = []

    def ask(self, request: dict[str, Any], _seconds: float) -> dict[str, Any]:
        self.asked += 1
        if self.bad is not None and self.bad.to_json() in request["candidates"]:
            raise WorkerFailed("timeout", "too long")
        Path(request["library"]).write_text("code")
        return {
            "names": [f"c{i}" for i in range(len(request["candidates"]))],
            "errors": [None] * len(request["candidates"]),
        }

    def pause(self, wanted: bool) -> None:
        self.paused.append(wanted)

    def stop(self) -> None:
        pass


class FakeMeasurer:
    """Measures what it is told; crashes on one function."""

    def __init__(self, times: dict[str, list[float]], errors: dict[str, float], bad: str = "") -> None:
        self.places, self.times, self.errors, self.bad = 1, times, errors, bad
        self.jobs: list[Job] = []

    def measure(self, job: Job) -> Measured:
        self.jobs.append(job)
        assert job.library.exists()
        if self.bad in job.functions:
            raise MeasuringFailed("crash", "it died")
        return Measured({n: self.times[n] for n in job.functions}, {n: self.errors.get(n, 0) for n in job.functions})

    def close(self) -> None:
        pass


def bench(builder: FakeBuilder, measurer: FakeMeasurer, cores: tuple[int, ...] = ()) -> Bench:
    return Bench(("{}", 1, False), [builder], measurer, cores)  # type: ignore[list-item]


def run(made: Bench, *candidates: Choices) -> list[Row]:
    batch = Batch(TASK, candidates)
    with made:
        return made.rows(batch)


def test_candidates_are_judged_by_their_numbers_and_their_noise() -> None:
    noisy, slow = [0.3, 1.2, 0.4, 1.1], [2.0, 4.0, 2.0, 4.0]
    times = {"c0": [1.0] * 4, "c1": [0.8, 0.8, 0.9, 0.8], "c2": noisy, "c3": [0.1] * 4, "c4": slow}
    rows = run(bench(FakeBuilder(), FakeMeasurer(times, {"c3": 1e-3})), RULES_CHOOSE, ONE, TWO, BAD, SLOW)
    assert [(row.choices, row.status) for row in rows] == [
        (RULES_CHOOSE, "ok"),
        (ONE, "ok"),
        (TWO, "noisy"),
        (BAD, "wrong"),
        (SLOW, "ok"),  # by how much is not known, but it is slower
    ]
    assert rows[0].ratio == 1.0 and rows[1].ratio == pytest.approx(0.8) and rows[1].seconds == 0.8
    assert "1.0e-03" in rows[3].why


def test_one_that_cannot_be_compiled_is_left_out() -> None:
    builder = FakeBuilder(bad=BAD)
    rows = run(bench(builder, FakeMeasurer({f"c{i}": [1.0] * 4 for i in range(3)}, {})), RULES_CHOOSE, BAD, ONE)
    assert {row.choices: row.status for row in rows} == {BAD: "timeout", RULES_CHOOSE: "ok", ONE: "ok"}
    assert builder.asked == 1 + 3 + 1  # together, one by one, those that can be


def test_one_that_crashes_is_found_and_the_others_are_measured() -> None:
    measurer = FakeMeasurer({f"c{i}": [1.0] * 4 for i in range(3)}, {}, bad="c1")
    rows = run(bench(FakeBuilder(), measurer), RULES_CHOOSE, BAD, ONE)
    assert {row.choices: row.status for row in rows} == {RULES_CHOOSE: "ok", BAD: "crash", ONE: "ok"}
    assert [job.functions for job in measurer.jobs] == [("c0", "c1", "c2"), ("c0",), ("c0", "c1"), ("c0", "c2")]


def test_builders_in_the_way_stop_while_something_is_measured() -> None:
    builder = FakeBuilder()
    builder.cores = (1,)  # type: ignore[assignment]
    run(bench(builder, FakeMeasurer({"c0": [1.0] * 4}, {}), cores=(1,)), RULES_CHOOSE)
    assert builder.paused == [True, False]
    aside = FakeBuilder()
    aside.cores = (0,)  # type: ignore[assignment]
    run(bench(aside, FakeMeasurer({"c0": [1.0] * 4}, {}), cores=(1,)), RULES_CHOOSE)
    assert aside.paused == []


def test_cores_are_shared_out() -> None:
    cores = tuple(sorted(os.sched_getaffinity(0)))
    assert divided_cores(1) == (cores[-1:], cores[:8])
    assert divided_cores(100) == (cores, cores[:8])


def test_ratios_are_taken_round_by_round() -> None:
    measured = Measured({"a": [1.0, 2.0, 4.0, 1.0], "b": [0.5, 1.0, 2.0, 0.5]}, {})
    assert ratios(measured, "a", "b") == (0.5, 0.0)
    assert ratios(Measured({"a": [2.0], "b": [1.0]}, {}), "a", "b") == (0.5, 0.0)


def test_code_that_crashes_or_hangs_ends_a_process_and_nothing_else(tmp_path: Path) -> None:
    """Machine code that calls abort() or pause(), next to some that works."""

    def function(statement: Any, name: str) -> Any:
        source, result = (tirx.decl_buffer((4,), "float32", n) for n in ("source", "result"))
        copy = tirx.BufferStore(result, source[0] * 2, [0])
        body = tirx.SeqStmt([tirx.Evaluate(statement), copy]) if statement is not None else copy
        return tirx.PrimFunc([source, result], body).with_attr("global_symbol", name)

    calls = {
        "sound": None,
        "aborts": tirx.call_extern("int32", "abort"),
        "hangs": tirx.call_extern("int32", "pause"),
    }
    module = IRModule({ir.GlobalVar(name): function(call, name) for name, call in calls.items()})
    module = with_threads(module, this_machine().arch)
    with transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        made = tvm_compile(module, target=tvm_target(this_machine()), tir_pipeline=CPU_CODE)
    toolchain.link(made, tmp_path / "odd.so", this_machine().arch)
    measurer = LocalMeasurer(divided_cores(1)[0], seconds=3)
    try:
        for name, status in (("aborts", "crash"), ("hangs", "timeout")):
            with pytest.raises(MeasuringFailed) as failure:
                measurer.measure(Job(tmp_path / "odd.so", "key", ("sound", name), TASK.arguments, 1, 0.1))
            assert failure.value.status == status
        with pytest.raises(MeasuringFailed, match="has no function"):
            measurer.measure(Job(tmp_path / "odd.so", "key", ("sound", "missing"), TASK.arguments, 1, 0.1))
        found = measurer.measure(Job(tmp_path / "odd.so", "key", ("sound",), TASK.arguments, 1, 0.1))
        assert set(found.seconds) == {"sound"} and measurer.runner.starts == 3
    finally:
        measurer.close()


@pytest.mark.parametrize(("weights", "sets"), [(0, 1), (5 * 64, 5), (5 * 64 + 63, 5), (1 << 40, 256)])
def test_weights_are_as_many_as_the_model_has_and_all_alike(weights: int, sets: int) -> None:
    arguments = [((4, 4), "float32", "weight"), ((3,), "float32", "data")]
    found = [[np.from_dlpack(array) for array in one] for one in _operands(arguments, weights)]
    assert len(found) == sets
    assert len({one[0].ctypes.data for one in found}) == sets
    assert {one[1].ctypes.data for one in found} == {found[0][1].ctypes.data}
    assert all(np.array_equal(one[0], found[0][0]) for one in found)
