"""Measuring on several machines: here a tracker and servers on this one, of which one is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.tvm.kernels.choices import Choices
from graphopt.backends.tvm.tune import builder, fleet
from graphopt.backends.tvm.tune.fleet import FleetMeasurer, servers
from graphopt.backends.tvm.tune.measuring import Job, MeasuringFailed
from graphopt.backends.tvm.tune.server import Server
from graphopt.backends.tvm.tune.tasks import extract
from graphopt.errors import UsageError
from graphopt.target import this_machine
from tests.tune import nets
from tests.tune.trackers import until

JOB = Job(Path("library.so"), "task", ("a",), (), 1, 0.1)


class Fake:
    """Callers that give these answers, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any], places: int = 3) -> None:
        self.answers = list(answers)
        monkeypatch.setattr(fleet, "servers", lambda *_: places)
        self.measurer = FleetMeasurer("host:1", "board")
        monkeypatch.setattr(self.measurer, "_asked", lambda *_: self.answers.pop(0))


def answer(server: str, *sample: float) -> dict[str, Any]:
    return {"server": server, "sample": list(sample), "seconds": {"a": [float(len(server))]}, "errors": {"a": 0.0}}


def test_a_job_of_a_server_that_is_lost_is_done_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, {"lost": "gone"}, answer("two", 1, 2), {"lost": "gone"}, answer("three", 1, 2))
    assert fake.measurer.measure(JOB).seconds == {"a": [3.0]}
    assert fake.measurer.measure(JOB).seconds == {"a": [5.0]}
    assert fake.measurer.lost == 2 and fake.measurer.banned == set()
    fake = Fake(monkeypatch, *[{"lost": "all gone"}] * 4)
    with pytest.raises(MeasuringFailed, match="all gone"):
        fake.measurer.measure(JOB)
    fake = Fake(monkeypatch, {"failed": "no such function"})
    with pytest.raises(MeasuringFailed, match="no such function") as failure:
        fake.measurer.measure(JOB)
    assert failure.value.status == "refused"


def test_a_server_with_other_numbers_than_two_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(
        monkeypatch,
        answer("liar", 1, 3),  # nobody objects yet
        answer("honest", 1, 2),  # one against one: it is asked again
        answer("honest too", 1, 2 + 1e-6),
        answer("liar", 1, 2),  # too late
        answer("honest", 1, 2),
    )
    assert fake.measurer.measure(JOB).seconds == {"a": [4.0]}
    assert fake.measurer.measure(JOB).seconds == {"a": [10.0]}
    assert fake.measurer.banned == {"liar"}
    assert fake.measurer.measure(JOB).seconds == {"a": [6.0]} and fake.answers == []
    unsettled = [answer(f"server {n}", 1, n) for n in range(4)]
    fake = Fake(monkeypatch, answer("first", 1, 9), *unsettled)
    fake.measurer.measure(JOB)
    with pytest.raises(MeasuringFailed, match="no two machines agree"):
        fake.measurer.measure(JOB)


def test_a_tracker_or_a_kind_that_is_not_there_is_refused(tracker: str) -> None:
    for place, why in (
        ("127.0.0.1:1", "there is no tracker"),
        ("nowhere", "there is no tracker"),
        (tracker, "no server"),
    ):
        with pytest.raises(UsageError, match=why):
            servers(place, "board")


def test_three_servers_of_which_one_is_killed(tracker: str, tmp_path: Path) -> None:
    tasks = extract(nets.model(), this_machine(), nets.machine())
    task = next(task for task in tasks.known.values() if task.kind == "product")
    candidates = [Choices(), Choices(tile=(3, 1)), Choices(steps=1)]
    library = tmp_path / "library.so"
    where = json.dumps(this_machine().to_json()), 1, False
    names = tuple(builder.compiled(task.function, candidates, where, library)["names"])
    machines = [Server(tracker, "board", host="127.0.0.1", port=19300) for _ in range(3)]
    assert until(tracker, 3) == 3
    measurer = FleetMeasurer(tracker, "board", seconds=30)
    try:
        assert measurer.places == 3
        job = Job(library, task.key, names, task.arguments, 1, 0.02)
        for turn in range(6):
            if turn == 2:
                os.kill(machines[0].process, signal.SIGKILL)
            measured = measurer.measure(job)
            assert set(measured.seconds) == set(names) and max(measured.errors.values()) < 1e-5
        assert until(tracker, 2) == 2 and measurer.banned == set()
        assert len(measurer._votes[task.key]) >= 2  # more than one took part
    finally:
        measurer.close()
        for machine in machines:
            machine.stop()


def test_a_server_that_hangs_is_given_up_and_its_job_done_elsewhere(tracker: str, tmp_path: Path) -> None:
    tasks = extract(nets.model(), this_machine(), nets.machine())
    task = next(task for task in tasks.known.values() if task.kind == "product")
    library = tmp_path / "library.so"
    where = json.dumps(this_machine().to_json()), 1, False
    names = tuple(builder.compiled(task.function, [Choices(), Choices(steps=1)], where, library)["names"])
    machines = [Server(tracker, "board", host="127.0.0.1", port=19500) for _ in range(2)]
    assert until(tracker, 2) == 2
    measurer = FleetMeasurer(tracker, "board", seconds=3)
    try:
        os.kill(machines[0].process, signal.SIGSTOP)  # it stays registered, accepts nothing and answers nothing
        for _ in range(4):
            measured = measurer.measure(Job(library, task.key, names, task.arguments, 1, 0.02))
            assert set(measured.seconds) == set(names) and max(measured.errors.values()) < 1e-5
            if measurer.lost:  # the tracker named the one that hangs
                break
        assert measurer.lost >= 1 and measurer.banned == set()
    finally:
        os.kill(machines[0].process, signal.SIGCONT)
        measurer.close()
        for machine in machines:
            machine.stop()
