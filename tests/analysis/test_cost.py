"""Costs against numbers worked out by hand and against torch's own counter."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt.analysis.cost import Cost, cost
from graphopt.analysis.lifetimes import Lifetime, peak_step
from graphopt.errors import UsageError

BATCH = {"x": {0: "batch"}}


class Block(nn.Module):
    """conv [8, 3, 3, 3], batch norm, relu, pooling, head [4, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def measured(module: nn.Module, *args: Tensor, dynamic: dict | None = None) -> Cost:
    return cost(graphopt.capture(module.eval(), args, dynamic=dynamic))


def test_block_by_hand() -> None:
    found = measured(Block(), torch.rand(2, 3, 6, 6))
    pixels = 2 * 6 * 6
    assert found.macs == pixels * 8 * 27 + 2 * 8 * 4
    assert found.parameters == 8 * 27 + 8 + 8 + 8 + 32 + 4
    assert found.weight_bytes == 4 * (found.parameters + 16), "running statistics are read too"
    assert found.operations == pixels * 8 * (2 + 1 + 1)
    conv = 4 * (pixels * 3 + pixels * 8 + 8 * 27 + 8)
    norm, relu, mean = 4 * (2 * pixels * 8 + 32), 4 * 2 * pixels * 8, 4 * (pixels * 8 + 16)
    assert found.moved_bytes == conv + norm + relu + mean + 4 * (16 + 8 + 32 + 4)
    assert found.peak_bytes == 4 * (pixels * 3 + 2 * pixels * 8), "the input, and what norm reads and writes"
    assert found.barriers == {} and found.names == ()
    assert found.operators["aten.conv2d.default"] == 1 and sum(found.operators.values()) == 5


def test_modules_include_what_is_inside_them() -> None:
    found = measured(Block(), torch.rand(2, 3, 6, 6))
    whole, stem, head = (found.modules[path] for path in ("", "stem", "head"))
    assert whole.macs == found.macs and whole.parameters == found.parameters
    assert stem.macs == found.modules["stem.0"].macs == 2 * 36 * 8 * 27
    assert stem.parameters == 8 * 27 + 8 + 16 and head.parameters == 36
    assert found.modules["stem.2"].type.endswith("ReLU")
    assert stem.moved_bytes == sum(found.modules[f"stem.{i}"].moved_bytes for i in range(3))
    assert [node.module for node in found.nodes] == ["stem.0", "stem.1", "stem.2", "", "head"]


def test_modules_of_a_model_from_a_file_keep_their_costs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    model = graphopt.capture(net, (torch.randn(3, 4),))
    model.save(tmp_path / "net.gopt")
    before, after = cost(model).modules, cost(graphopt.load(tmp_path / "net.gopt")).modules
    assert list(before) == ["", "0", "0.0", "0.1", "1"] and set(after) == set(before)
    assert all(after[path].macs == module.macs for path, module in before.items())
    assert all(after[path].parameters == module.parameters for path, module in before.items())


def test_free_sizes_stay_expressions_until_they_are_given() -> None:
    found = measured(Block(), torch.rand(2, 3, 6, 6), dynamic=BATCH)
    batch = sympy.Symbol("batch", integer=True, positive=True)
    assert found.macs == (36 * 8 * 27 + 32) * batch
    assert str(found.macs) == "7808*batch" and "7808*batch" in str(found)
    assert found.names == ("batch",)
    for size in (1, 2, 5):
        fixed = measured(Block(), torch.rand(size, 3, 6, 6))
        numbers = found.at(batch=size)
        assert (numbers.macs, numbers.operations) == (fixed.macs, fixed.operations)
        assert (numbers.moved_bytes, numbers.peak_bytes) == (fixed.moved_bytes, fixed.peak_bytes)
        assert numbers.modules == fixed.modules
    assert found.at(batch=5).names == ()


def test_sizes_given_have_to_be_the_free_ones() -> None:
    found = measured(Block(), torch.rand(2, 3, 6, 6), dynamic=BATCH)
    for wrong in ({}, {"bacth": 2}, {"batch": 2, "width": 3}):
        with pytest.raises(UsageError, match="free sizes are batch"):
            found.at(**wrong)
    model = graphopt.capture(Block().eval(), (torch.rand(2, 3, 6, 6),), dynamic=BATCH)
    assert cost(model, {"batch": 3}).macs == 7808 * 3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tied_weights_count_once() -> None:
    found = measured(Tied(), torch.tensor([[1, 2, 3]]))
    assert found.parameters == 800 and found.weight_bytes == 3200
    assert found.modules["embed"].parameters == found.modules["head"].parameters == 800
    assert found.macs == 3 * 800
    lookup = next(node for node in found.nodes if "embedding" in node.operator)
    assert lookup.moved_bytes == 3 * 8 + 4 * 24 * 2, "indices, three rows read and written"


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.reshape(2, 2, 12).transpose(1, 2).chunk(2, 1)
        return torch.relu(a) + b


def test_views_move_nothing_and_keep_their_base_alive() -> None:
    found = measured(Views(), torch.rand(2, 24))
    moved = {node.operator: node.moved_bytes for node in found.nodes}
    assert moved["aten.reshape.default"] == moved["aten.transpose.int"] == moved["aten.chunk.default"] == 0
    assert moved["aten.relu.default"] == 2 * 24 * 4 and moved["aten.add.Tensor"] == 3 * 24 * 4
    assert found.peak_bytes == 4 * (48 + 24 + 24)
    names = [buffer.name for buffer in found.buffers]
    assert len(names) == 3, f"{names} are more than the input and two results"


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs() + x[:, :3].sum()


def test_unknown_operators_are_named_and_not_counted() -> None:
    found = measured(Cumulative(), torch.rand(2, 4))
    assert found.barriers == {"aten.fft_rfft.default": 1}
    assert found.nodes[0].macs is None and found.macs == 0
    assert "aten.fft_rfft.default (1 times)" in str(found)
    assert found.modules[""].macs == 0


def test_counting_batches_while_training_is_free() -> None:
    model = graphopt.capture(Block().train(), (torch.rand(2, 3, 6, 6),))
    found = cost(model)
    assert found.barriers == {} and len(found.nodes) == 5
    assert found.macs == 7808 * 2 and found.parameters == 276


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, 16))


def test_macs_of_attention_with_two_free_sizes_equal_torch() -> None:
    net = Attention().eval()
    found = measured(net, torch.rand(2, 5, 16), dynamic={"x": {0: "batch", 1: "length"}})
    assert found.names == ("batch", "length")
    x = torch.rand(3, 7, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x)
    assert 2 * found.at(batch=3, length=7).macs == counter.get_total_flops()


def test_the_peak_is_looked_for_again_at_other_sizes() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return (x @ x.T).sum() + 1, (y * 2).relu()

    model = graphopt.capture(Net(), (torch.rand(4, 2), torch.rand(50)), dynamic={"x": {0: "n"}})
    found = cost(model)
    inputs = 50 * 4
    assert found.at(n=4).peak_bytes == 4 * 8 + inputs + 4 + 2 * 200
    assert found.at(n=100).peak_bytes == 4 * 200 + inputs + 4 * 100 * 100 + 4


def test_peak_of_intervals() -> None:
    buffers = [Lifetime("a", 4, 0, 3), Lifetime("b", 8, 1, 2), Lifetime("c", 5, 3, 4)]
    assert peak_step(buffers, int) == 1
    assert peak_step([Lifetime("a", 4, 0, 1), Lifetime("b", 8, 2, 2)], int) == 2
    assert peak_step([], int) == 0


def test_json_holds_numbers_and_texts_only() -> None:
    found = measured(Block(), torch.rand(2, 3, 6, 6), dynamic=BATCH)
    data = json.loads(json.dumps(found.to_json()))
    assert data["macs"] == "7808*batch" and data["names"] == ["batch"]
    assert data["modules"]["stem"]["parameters"] == 240
    assert len(data["nodes"]) == 5 and data["nodes"][0]["weights"] == ["stem.0.weight", "stem.0.bias"]
    assert json.loads(json.dumps(found.at(batch=2).to_json()))["macs"] == 7808 * 2


def test_counting_changes_nothing_and_adds_no_guard() -> None:
    model = graphopt.capture(Block().eval(), (torch.rand(2, 3, 6, 6),), dynamic=BATCH)
    guards, text = len(model.shapes.env.guards), str(model)
    cost(model)
    assert len(model.shapes.env.guards) == guards and str(model) == text


def test_ten_thousand_nodes_cost_less_than_a_second() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(x)

    model = graphopt.capture(Deep().eval(), (torch.rand(2, 4),), dynamic=BATCH)
    graph, last = model.graph, next(node for node in model.graph.nodes if "linear" in node.name)
    output, first = next(iter(last.users)), last
    with graph.inserting_before(output):
        for step in range(10_000):
            target = torch.ops.aten.relu.default if step % 2 else torch.ops.aten.linear.default
            made = graph.call_function(target, (last, *(() if step % 2 else first.args[1:])))
            made.meta |= {"val": last.meta["val"], "nn_module_stack": first.meta["nn_module_stack"]}
            last = made
    output.replace_input_with(first, last)
    start = time.process_time()
    found = cost(model)
    assert time.process_time() - start < 1
    assert found.at(batch=3).macs == 5001 * 3 * 16
