"""Whole blocks go: which are worth what, which go, and what is left."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.passes._blocks import find_blocks
from graphopt.rewriter import Rewriter
from tests import zoo
from tests.compare import relative_error
from tests.passes.apply import gradients
from tests.passes.residual import (
    Residual,
    adding,
    batches,
    capture,
    distance,
    failure,
    mlp,
    removed,
    resnet,
    shortened,
    worth,
)

# What goes, and what is left


def test_residual_blocks_by_what_the_outputs_lose() -> None:
    net, calib = resnet(), batches()
    small, report = shortened(capture(net), "count=1")
    expected, full = {}, copy.deepcopy(net)
    for index, block in enumerate(net.blocks):
        block.skipped = True
        expected[f"blocks.{index}"] = distance(calib, net, full)
        block.skipped = False
    assert worth(report) == pytest.approx(expected, rel=1e-4)
    (gone,) = removed(report)
    assert gone == min(expected, key=expected.__getitem__)
    assert report.findings["output error"] == pytest.approx(expected[gone], rel=1e-4)
    assert report.findings["achieved"] == report.findings["budget"] == {"count": 1} and report.findings["iterated"]
    net.get_submodule(gone).skipped = True
    for (x,) in (*batches(), batches((3, 3, 8, 8))[0]):
        assert relative_error(small(x[:3]), net(x[:3])) <= 1e-5
    assert not any(name.startswith(f"{gone}.") for name in small.state_dict())
    assert [edit.why for edit in report.edits if "branch" in edit.why] == [f"without the branch '{gone}'"]
    assert all(g is not None and g.isfinite().all() for g in gradients(small, calib[0]).values())


def test_a_projection_stays_where_its_block_goes() -> None:
    net = resnet()
    small, report = shortened(capture(net), "count=1,only=blocks.2")
    assert removed(report) == ["blocks.2"]
    left = {name for name in small.state_dict() if name.startswith("blocks.2.")}
    assert left and all(name.startswith("blocks.2.short.") for name in left)


@torch.no_grad()
def test_similarity_is_of_what_goes_in_and_comes_out() -> None:
    net, calib = resnet(), batches()
    _, report = shortened(capture(net), "count=2,importance=similarity")
    expected = {}
    for index, block in enumerate(net.blocks):
        sums: list[Tensor] = []
        for (x,) in calib:
            x = net.blocks[:index](torch.relu(net.stem(x)))
            kept = block.short(x)
            made = kept + block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            sums += [F.cosine_similarity(kept.double(), made.double(), 1).flatten()]
        expected[f"blocks.{index}"] = 1 - float(torch.cat(sums).mean())
    assert worth(report) == pytest.approx(expected, abs=1e-4)
    assert sorted(removed(report)) == sorted(sorted(expected, key=expected.__getitem__)[:2])
    assert not report.findings["iterated"]


@pytest.mark.parametrize(
    ("name", "layers"), [("gpt2", "transformer.h"), ("llama", "model.layers"), ("vit", "vit.layers")]
)
def test_a_transformer_layer_is_attention_and_mlp(name: str, layers: str) -> None:
    net = zoo.build(name)
    model = go.capture(net.module, net.args(), dynamic=net.dynamic)
    calib = [list(net.args(4, seed)) for seed in (1, 2)]
    small, report = shortened(model, "count=1,importance=similarity", calib)
    assert list(worth(report)) == [f"{layers}.{index}" for index in range(3)] and not report.misses
    assert all(len(row["branches"]) == 2 for row in report.findings["blocks"])
    (gone,) = removed(report)
    del net.module.get_submodule(layers)[int(gone[-1])]
    for batch, seed in ((2, 5), (3, 6)):
        args = net.args(batch, seed)
        with torch.no_grad():
            assert relative_error(small(*args), net.module(*args)) <= 1e-5
    _, report = shortened(model, "macs=0.85,unit=branch", calib)
    assert len(worth(report)) == 6 and report.findings["achieved"]["macs"] <= 0.85
    assert all(name.count(".") > layers.count(".") + 1 for name in removed(report))


def test_a_block_that_does_nothing_goes_first() -> None:
    model = capture(resnet((1.0, 0.0, 1.0, 1.0)))
    for importance in ("loss", "similarity"):
        small, report = shortened(model, f"count=1,importance={importance}")
        assert removed(report) == ["blocks.1"] and report.findings["removed"][0]["importance"] == pytest.approx(
            0, abs=1e-6
        )
        assert relative_error(small(batches()[0][0]), model(batches()[0][0])) <= 1e-5


@pytest.mark.parametrize(("iterate", "error"), [("true", 0.5), ("false", 1.49)])
def test_after_a_removal_the_rest_is_measured_again(iterate: str, error: float) -> None:
    """Without the 0.5, the 1.0 that is taken off would be missed less than the 0.99 that is added."""
    model = capture(nn.Sequential(adding(0.99), adding(-1.0), adding(0.5)), (2, 1))
    calib = [[torch.ones(4, 1)]]
    _, report = shortened(model, f"count=2,iterate={iterate}", calib)
    assert report.findings["output error"] == pytest.approx(error / 1.49, rel=1e-5)
    assert removed(report) == ["2.layers.0", "1.layers.0" if iterate == "true" else "0.layers.0"]


def test_measuring_again_is_left_out_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes import _shortening

    monkeypatch.setattr(_shortening, "_MOST_RUNS", 13)  # 4 blocks, then 3, on 2 batches
    _, report = shortened(capture(resnet()), "count=2")
    assert not report.findings["iterated"]


# Budgets


@pytest.mark.parametrize(("kind", "importance"), [("macs", "loss"), ("params", "similarity")])
def test_a_budget(kind: str, importance: str) -> None:
    model = capture(resnet())
    _, report = shortened(model, f"{kind}=0.7,importance={importance}")
    before, after = report.cost_before, report.cost_after
    assert before is not None and after is not None
    left = after.at(batch=2).macs / before.at(batch=2).macs if kind == "macs" else after.parameters / before.parameters
    assert 0.2 < left <= 0.7 and report.findings["achieved"] == {kind: pytest.approx(left)}
    rows = {row["block"]: row["saves"] for row in report.findings["blocks"]}
    assert 1 - sum(rows[name] for name in removed(report)) == pytest.approx(left)
    # None of those that went could have stayed.
    assert all(left + rows[name] > 0.7 for name in removed(report))


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    model = capture(resnet())
    every, report = shortened(model, "count=4")
    smallest = sum(layer_macs(every).values()) / sum(layer_macs(model).values())
    assert f"{smallest:.3g} is the smallest that was reached" in failure(model, "macs=0.01")
    assert "1 is the smallest" not in failure(model, "params=0.01") and len(removed(report)) == 4


def test_a_latency_is_measured_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[float] = []

    def build(watch: Stopwatch, model: go.Model) -> float:
        built.append(sum(layer_macs(model).values()))
        return built[-1]

    monkeypatch.setattr(Stopwatch, "build", build)
    monkeypatch.setattr(Stopwatch, "ratio", lambda watch, one, other, inputs: 0.1 + 0.9 * one / other)
    monkeypatch.setattr(LatencyTable, "seconds", lambda table, node: 1.0)
    model = capture(resnet())
    _, report = shortened(model, "latency=0.7")
    achieved = report.findings["achieved"]["latency"]
    assert achieved <= 0.7 and achieved == pytest.approx(0.1 + 0.9 * built[-1] / built[0])
    assert [row["saves"] for row in report.findings["blocks"]] == pytest.approx([2 / 11] * 4)  # of 11 layers
    assert "latency=0.1 cannot be met" in failure(model, "latency=0.1")


# Blocks in each other, beside each other, with weights in common


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.outer = Residual(nn.Linear(6, 6), mlp(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.stem(x)))


def test_a_block_in_a_block() -> None:
    net, calib = Nested(), batches((2, 6))
    nn.init.zeros_(net.outer.layers[1].layers[2].weight)
    model = capture(net, (2, 6))
    _, report = shortened(model, "count=1", calib)
    assert len(worth(report)) == 2 and "outer.layers.1" in removed(report)[0]
    smallest, report = shortened(model, "macs=0.3", calib)
    (gone,) = removed(report)  # the inner one is a part of the outer one
    assert gone == "outer.layers"
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert relative_error(smallest(x), net.head(net.stem(x))) <= 1e-5
    assert "2 blocks can go" in failure(model, "count=3", calib)
    assert "count=2 cannot be met: 1 blocks can go" in failure(model, "count=2", calib)


class Repeated(nn.Module):
    """One block, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), mlp(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.block(self.stem(x)))))


def test_weights_in_common_stay_while_they_are_used() -> None:
    model, calib = capture(Repeated(), (2, 6)), batches((2, 6))
    small, report = shortened(model, "count=2", calib)
    assert list(worth(report)) == ["block.layers", "block.layers#2", "block.layers#3"]
    assert small.state_dict().keys() == model.state_dict().keys()
    _, report = shortened(model, "params=0.5", calib)
    assert len(removed(report)) == 3 and report.findings["achieved"]["params"] == pytest.approx(56 / 166)


def test_names() -> None:
    model = capture(resnet())
    _, report = shortened(model, "count=1,only=blocks.0;blocks.3")
    assert list(worth(report)) == ["blocks.0", "blocks.3"]
    _, report = shortened(model, "count=1,leave=blocks.1")
    assert list(worth(report)) == ["blocks.0", "blocks.2", "blocks.3"]
    _, report = shortened(model, "count=1,only=blocks,leave=blocks.0;blocks.1;blocks.2")
    assert removed(report) == ["blocks.3"]
    assert "did you mean blocks.1" in failure(model, "count=1,only=block.1")
    assert "no block is called 'stem'" in failure(model, "count=1,leave=stem")


# All of it, by chance


class Random(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, mlp()
        self.a, self.b, self.short = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        made = self.b(torch.tanh(self.a(F.layer_norm(x, (6,)))))
        made = self.inner(made) if self.kind == "nested" else made
        kept = self.short(x) if self.kind == "wide" else x
        total = kept if self.skipped else kept + made
        return torch.relu(total) if self.kind == "post" else total


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(["plain", "post", "wide", "nested"]), min_size=2, max_size=5),
    count=st.integers(1, 2),
    importance=st.sampled_from(["loss", "similarity"]),
)
def test_what_is_left_is_the_net_without_the_blocks(kinds: list[str], count: int, importance: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), *map(Random, kinds), nn.Linear(6, 2)).eval()
    x = torch.randn(3, 6)
    model = go.capture(net, (x,))
    outer = ";".join(block.name for block in find_blocks(Rewriter(model), "layer") if "inner" not in block.name)
    leave = f",leave={';'.join(f'{i + 1}.inner' for i, kind in enumerate(kinds) if kind == 'nested')}"
    text = f"count={count},importance={importance}" + (leave if "nested" in kinds else "")
    small, report = shortened(model, text, [[torch.randn(3, 6)]])
    assert len(removed(report)) == count and set(removed(report)) <= set(outer.split(";"))
    for name in removed(report):
        net.get_submodule(name.partition(".")[0]).skipped = True
    with torch.no_grad():
        assert relative_error(small(x), net(x)) <= 1e-5
