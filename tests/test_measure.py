"""Measured layers: what their time depends on, that it is remembered, and what cannot be measured."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.deployed import Deployed
from graphopt.errors import UsageError
from graphopt.fake import Shapes
from graphopt.measure import LatencyTable, Stopwatch, cache_folder, runs_here
from graphopt.sample import usual_inputs
from graphopt.target import Target

CPU = Target.parse("cpu")


def captured(width: int = 8, batch: int = 2) -> go.Model:
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 4)).eval()
    return go.capture(net, (torch.randn(batch, 3, 8, 8),), dynamic={0: {0: "batch"}})


def layers(width: int = 8) -> list[object]:
    model = captured(width)
    return [node for node in model.graph.nodes if str(node.target) in ("aten.conv2d.default", "aten.linear.default")]


def test_a_layer_is_measured_once(tmp_path: Path) -> None:
    watch = Stopwatch(CPU, 1, "reference")
    table = LatencyTable(watch, Shapes(), tmp_path)
    first = [table.seconds(node) for node in layers()]
    assert all(0 < seconds < 10 for seconds in first) and table.measured == 2
    again = LatencyTable(watch, Shapes(), tmp_path)
    assert [again.seconds(node) for node in layers()] == first and again.measured == 0
    again.seconds(layers(9)[0])
    assert again.measured == 1


def test_compiled_layers_are_measured(tmp_path: Path) -> None:
    table = LatencyTable(Stopwatch(CPU, 1), Shapes(), tmp_path)
    assert all(0 < table.seconds(node) < 10 for node in layers())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latency.sqlite").write_text("this is no database, and long enough to be looked at " * 40)
    with pytest.raises(UsageError, match=r"latency.sqlite' cannot be used"):
        LatencyTable(Stopwatch(CPU, 1, "reference"), Shapes(), tmp_path).seconds(layers()[0])  # type: ignore[arg-type]


def test_what_a_time_depends_on(tmp_path: Path) -> None:
    conv = layers()[0]

    def key(node: object = conv, **changes: object) -> str:
        watch = Stopwatch(**{"target": CPU, "threads": 1, "backend": "reference"} | changes)  # type: ignore[arg-type]
        return LatencyTable(watch, Shapes(), tmp_path).key(node)  # type: ignore[arg-type]

    others = [
        key(layers(9)[0]),
        key(layers()[1]),
        key(threads=2),
        key(backend="tvm"),
        key(target=dataclasses.replace(CPU, l2=CPU.l2 * 2)),
    ]
    assert len({key(), *others}) == 6
    assert key(layers()[0]) == key()


def test_layers_are_measured_at_the_sizes_of_the_users_example(tmp_path: Path) -> None:
    """torch takes a batch of 1 for a fixed size, so that the graph was traced with 2."""
    watch = Stopwatch(CPU, 1, "reference")
    keys = {}
    for batch in (1, 2, 3):
        model = captured(batch=batch)
        table = LatencyTable(watch, model.shapes, tmp_path)
        keys[batch] = {table.key(node) for node in model.graph.nodes if str(node.target) == "aten.conv2d.default"}
        assert [tuple(x.shape) for x in usual_inputs(model)] == [(batch, 3, 8, 8)]
        assert sum(layer_macs(model).values()) == batch * (8 * 27 * 36 + 8 * 36 * 4)
    assert len(set().union(*keys.values())) == 3
    captured(batch=1).save(tmp_path / "net.gopt")
    again = go.load(tmp_path / "net.gopt")
    assert [tuple(x.shape) for x in usual_inputs(again)] == [(1, 3, 8, 8)]


def test_the_start_of_a_program_is_no_part_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def build(watch: Stopwatch, model: go.Model) -> _Counted:
        convolutions = sum(str(node.target) == "aten.conv2d.default" for node in model.graph.nodes)
        return _Counted(clock, 7.0 + 2.0 * convolutions)

    monkeypatch.setattr(Stopwatch, "build", build)
    table = LatencyTable(Stopwatch(CPU), Shapes(), tmp_path)
    assert table.seconds(layers()[0]) == pytest.approx(2.0)  # type: ignore[arg-type]


def test_models_are_compared_as_they_are_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms are folded in both, so that removing one saves nothing."""
    normed, plain = (
        go.capture(nn.Sequential(nn.Conv2d(3, 4, 1), *norms).eval(), (torch.randn(1, 3, 2, 2),))
        for norms in ([nn.BatchNorm2d(4)], [])
    )
    built: list[int] = []
    monkeypatch.setattr(Stopwatch, "build", lambda watch, model: built.append(len(model.graph.nodes)) or len(built))
    monkeypatch.setattr(Stopwatch, "ratio", lambda watch, one, other, inputs: one / other)
    assert Deployed(normed, Stopwatch(CPU)).part(plain) == 2 and built[0] == built[1]
    assert len(normed.graph.nodes) > len(plain.graph.nodes)


def test_another_machines_code_is_not_measured() -> None:
    arm = Target.parse("cortex-a72") if CPU.kind != "arm64" else Target.parse("x86-64-v3")
    assert runs_here(CPU) and not runs_here(arm)
    with pytest.raises(UsageError, match="cannot be measured here"):
        Stopwatch(arm)


def test_where_measurements_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("GRAPHOPT_CACHE")
    assert cache_folder().name == "graphopt"


def test_two_models_take_turns() -> None:
    slow, fast = (go.capture(nn.Linear(size, size).eval(), (torch.randn(64, size),)) for size in (256, 16))
    watch = Stopwatch(CPU, 1, "reference")
    wide, narrow = watch.build(slow), watch.build(fast)

    class Narrow:
        def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return narrow.run([tensors[0][:, :16].contiguous()])

    inputs = [torch.randn(64, 256)]
    assert watch.ratio(wide, wide, inputs) < 50
    assert watch.ratio(Narrow(), wide, inputs) > 0  # type: ignore[arg-type]


class _Counted:
    """Moves a clock on by what its calls take, each number in turn."""

    def __init__(self, clock: list[float], *seconds: float) -> None:
        self.clock, self.seconds = clock, itertools.cycle(seconds)

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        self.clock[0] += next(self.seconds)
        return tensors


def test_single_calls_that_were_disturbed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch = Stopwatch(CPU)

    def ratio(*pair: _Counted) -> float:
        return watch.ratio(*pair, [])  # type: ignore[arg-type]  # both only run

    steady = _Counted(clock, 2.0)
    assert ratio(_Counted(clock, 1.0), steady) == pytest.approx(0.5)
    assert ratio(_Counted(clock, 1.0, 9.0, 5.0), steady) == pytest.approx(0.5)
    assert ratio(steady, _Counted(clock, 7.0, 4.0)) == pytest.approx(0.5)
