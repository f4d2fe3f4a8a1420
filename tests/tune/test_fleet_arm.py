"""A fleet with machines of another architecture: aarch64, in qemu's user mode."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.backends.tvm.kernels.choices import Choices
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.tune import builder
from graphopt.backends.tvm.tune.fleet import FleetMeasurer
from graphopt.backends.tvm.tune.measuring import Job, MeasuringFailed
from graphopt.backends.tvm.tune.server import Server
from graphopt.backends.tvm.tune.tasks import extract
from graphopt.target import Target, this_machine
from tests.tune import nets
from tests.tune.arm_python import arm_python
from tests.tune.trackers import until

CANDIDATES = [Choices(), Choices(tile=(3, 1)), Choices(steps=1)]
SERVER = """
import sys
from graphopt.backends.tvm.tune.server import Server
Server(sys.argv[1], "arm", host="127.0.0.1", port=19500).wait()
"""
SECONDS = 180
"""A server in qemu takes some to import what it needs."""


@pytest.fixture
def arm_servers(tracker: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two, as `graphopt rpc-server` makes them, and two of this architecture beside them."""
    command = [str(arm_python()), "-c", SERVER, tracker]
    started = [subprocess.Popen(command, start_new_session=True) for _ in range(2)]
    here = [Server(tracker, "board", host="127.0.0.1", port=19400) for _ in range(2)]
    yield started
    for machine in here:
        machine.stop()
    for process in started:
        with_all(process, signal.SIGKILL)


def with_all(process: subprocess.Popen[bytes], signal_: int) -> None:
    """What `kill` does to a machine: its server and what that has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal_)
        process.wait()


def job_for(target: Target, folder: Path) -> Job:
    tasks = extract(nets.model(), target, Machine.of(target, 1))
    task = next(task for task in tasks.known.values() if task.kind == "product")
    library = folder / f"{target.arch}.so"
    names = builder.compiled(task.function, CANDIDATES, (json.dumps(target.to_json()), 1, False), library)["names"]
    return Job(library, task.key, tuple(names), task.arguments, 1, 0.02)


def test_code_for_arm_is_measured_there_and_not_here(
    tracker: str, arm_servers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    arm, here = job_for(Target.parse("arm64"), tmp_path), job_for(this_machine(), tmp_path)
    assert until(tracker, 2, "board") == 2 and until(tracker, 2, "arm", SECONDS) == 2
    there, beside = FleetMeasurer(tracker, "arm", seconds=60), FleetMeasurer(tracker, "board", seconds=60)
    try:
        for turn in range(4):
            if turn == 2:
                with_all(arm_servers[0], signal.SIGKILL)
            measured = there.measure(arm)
            assert set(measured.seconds) == set(arm.functions) and max(measured.errors.values()) < 1e-5
        assert until(tracker, 1, "arm") == 1 and there.banned == set()
        assert max(beside.measure(here).errors.values()) < 1e-5
        with pytest.raises(MeasuringFailed):  # code of another architecture
            beside.measure(arm)
    finally:
        there.close()
        beside.close()
