"""What of a layer's time goes with its channels: the narrower layer that is measured, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.ops import argument
from graphopt.passes._half_width import saveable
from graphopt.rewriter import Node
from graphopt.target import Target

LAYERS = [
    (nn.Conv2d(32, 64, 3, padding=1), (2, 32, 8, 8), (16, 32), [2, 16, 8, 8], 1 / 4),
    (nn.Conv2d(3, 64, 3, bias=False), (2, 3, 8, 8), (3, 32), [2, 3, 8, 8], 1 / 2),  # an image has all its channels
    (nn.Conv2d(48, 48, 3, groups=48), (2, 48, 8, 8), (1, 16), [2, 16, 8, 8], 1 / 3),  # whole vectors of 16
    (nn.Conv1d(12, 20, 3), (2, 12, 8), (6, 10), [2, 6, 8], 1 / 4),  # less than two vectors
    (nn.Linear(64, 96), (2, 7, 64), (32, 48), [2, 7, 32], 1 / 4),
]


def layer_of(module: nn.Module, shape: tuple[int, ...]) -> tuple[go.Model, Node]:
    model = go.capture(module.eval(), (torch.randn(shape),))
    (node,) = [node for node in model.graph.nodes if node.op == "call_function"]
    return model, node


@pytest.mark.parametrize(("module", "shape", "weight", "input_", "left"), LAYERS)
def test_the_part_that_goes_with_the_channels(
    module: nn.Module,
    shape: tuple[int, ...],
    weight: tuple[int, int],
    input_: list[int],
    left: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With a clock that takes 5 seconds for any layer and 12 for the multiply-accumulates of the whole one."""
    model, node = layer_of(module, shape)
    asked: list[Node] = []

    def seconds(table: LatencyTable, layer: Node) -> float:
        asked.append(layer)
        return 5.0 + 12.0 * (1.0 if layer is node else left)

    monkeypatch.setattr(LatencyTable, "seconds", seconds)
    table = LatencyTable(Stopwatch(Target.parse("cpu")), model.shapes, tmp_path)
    assert saveable(table, node, 16) == pytest.approx(12.0)
    whole, half = asked
    assert whole is node and half.target is node.target
    assert list(argument(half, "input").meta["val"].shape) == input_
    assert tuple(argument(half, "weight").meta["val"].shape[:2]) == (weight[1], weight[0])


def test_the_narrower_layer_can_be_measured(tmp_path: Path) -> None:
    for module, shape, *_ in LAYERS:
        model, node = layer_of(module, shape)
        table = LatencyTable(Stopwatch(Target.parse("cpu"), 1, "reference"), model.shapes, tmp_path)
        assert 0 <= saveable(table, node, 16) <= table.seconds(node)
        assert table.measured == 2


def test_all_of_the_time_where_a_layer_has_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatencyTable, "seconds", lambda table, node: 3.0)
    for module, shape in ((nn.Conv2d(32, 32, 3, groups=4), (1, 32, 8, 8)), (nn.Linear(3, 1), (1, 3))):
        model, node = layer_of(module, shape)
        table = LatencyTable(Stopwatch(Target.parse("cpu")), model.shapes, tmp_path)
        assert saveable(table, node, 16) == 3.0, module
