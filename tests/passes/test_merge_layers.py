"""Several layers as one: what they become, what that loses, and that budgets are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.errors import UsageError
from graphopt.passes import _merge_losses
from graphopt.rewriter import Rewriter
from graphopt.transform import Report
from tests.compare import relative_error
from tests.passes.apply import Net, operators

Batches = list[tuple[Tensor]]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))


def captured(net: nn.Module, *shape: int) -> go.Model:
    return go.capture(net.eval(), (torch.randn(2, *shape),))


def images(*shape: int, count: int = 3) -> Batches:
    return [(torch.randn(2, *shape),) for _ in range(count)]


def conv(i: int, o: int, k: int = 3, s: int = 1, groups: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, s, k // 2, groups=groups, **options)


def chain(width: int = 8) -> nn.Module:
    """Wide in the middle, so that one layer for all is cheaper."""
    wide = 6 * width
    return nn.Sequential(
        conv(width, wide, 1), nn.ReLU(), conv(wide, wide, 3, groups=wide), nn.ReLU(), conv(wide, width, 1),
        conv(width, wide, 1), nn.ReLU6(), conv(wide, width, 1), nn.ReLU(), conv(width, 4),
    )  # fmt: skip


def merge(model: go.Model, text: str, calib: Batches) -> tuple[go.Model, Report]:
    small, (report,) = go.run(model, text, calib=calib)
    return small, report


def error(small: go.Model, model: go.Model, batch: tuple[Tensor]) -> float:
    with torch.no_grad():
        return relative_error(small.call_flat(batch)[0], model.call_flat(batch)[0])


# Merging


def test_what_one_convolution_can_do_is_merged_exactly() -> None:
    net = nn.Sequential(conv(8, 48, 1), nn.Conv2d(48, 48, 3, groups=48), conv(48, 8, 1), nn.ReLU(), conv(8, 8))
    model, calib = captured(net, 8, 10, 10), images(8, 10, 10)
    small, report = merge(model, "merge-layers{macs=0.7}", calib)
    assert [row["layers"] for row in report.findings["merged"]] == [3]
    assert operators(small) == ["conv2d", "relu", "conv2d"]
    assert error(small, model, images(8, 10, 10)[0]) < 1e-5 and report.findings["output error"] < 1e-5


@pytest.mark.parametrize("plan", ["one-stage", "two-stage"])
@pytest.mark.parametrize("part", [0.75, 0.5])
def test_a_budget_is_kept_and_outputs_stay_near(part: float, plan: str) -> None:
    model, calib = captured(chain(), 8, 12, 12), images(8, 12, 12, count=16)
    small, report = merge(model, f"merge-layers{{macs={part},plan={plan}}}", calib)
    reached = sum(layer_macs(small).values()) / sum(layer_macs(model).values())
    assert report.findings["achieved"]["macs"] == pytest.approx(reached) and 0.2 < reached <= part
    others = images(8, 12, 12, count=4)
    ours = sum(error(small, model, batch) for batch in others)
    nothing = [relative_error(torch.zeros_like(y), y) for batch in others for y in model.call_flat(batch)]
    assert ours < 0.6 * sum(nothing)


def test_less_is_lost_of_a_larger_budget() -> None:
    model, calib = captured(chain(), 8, 12, 12), images(8, 12, 12, count=8)
    lost = []
    for part in (0.8, 0.55, 0.3):
        _, report = merge(model, f"merge-layers{{macs={part}}}", calib)
        lost.append(sum(row["loss"] for row in report.findings["merged"]))
    assert 0 < lost[0] <= lost[1] <= lost[2] and lost[0] < lost[2]


def test_blocks_of_other_kinds_become_one_convolution() -> None:
    def gated(net: Any, x: Tensor) -> Tensor:  # squeeze and excitation
        y = net.a(x)
        return net.c(torch.relu(x + y * torch.sigmoid(net.b(y.mean((2, 3), keepdim=True)))))

    def normed(net: Any, x: Tensor) -> Tensor:  # as in ConvNeXt
        y = net.norm(net.a(x).permute(0, 2, 3, 1))
        return net.c(x + net.e(F.gelu(net.d(y))).permute(0, 3, 1, 2))

    nets = [
        Net(gated, a=conv(8, 8, 5), b=nn.Conv2d(8, 8, 1), c=conv(8, 2, 1)),
        Net(
            normed,
            a=conv(8, 8, 7, groups=8),
            norm=nn.LayerNorm(8),
            d=nn.Linear(8, 32),
            e=nn.Linear(32, 8),
            c=conv(8, 2, 1),
        ),
    ]
    for net in nets:
        model = captured(net, 8, 12, 12)
        small, report = merge(model, "merge-layers{macs=0.5}", images(8, 12, 12, count=8))
        (row,) = report.findings["merged"]
        assert row["window"] in (1, 3) and operators(small).count("conv2d") <= 2 and "permute" not in operators(small)
        assert report.findings["output error"] < 0.5


def test_free_batch_and_the_module_stay() -> None:
    net = chain().eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    model = go.capture(net, (torch.randn(2, 8, 12, 12),), dynamic={0: {0: "batch"}})
    small, _ = merge(model, "merge-layers{macs=0.5}", [(torch.randn(8, 8, 12, 12),)])
    assert small(torch.randn(5, 8, 12, 12)).shape == (5, 4, 12, 12)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in small.parameters())


# The table on disk


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: int = -1) -> list[int]:
    calls: list[int] = []
    fitted: Callable[..., Any] = _merge_losses.fitted

    def count(*args: Any) -> Any:
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(1)
        return fitted(*args)

    monkeypatch.setattr(_merge_losses, "fitted", count)
    return calls


def test_another_budget_and_a_run_after_a_kill_measure_only_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, calib = captured(chain(), 8, 12, 12), images(8, 12, 12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, fail_at=7)
        merge(model, "merge-layers{macs=0.6}", calib)
    (file,) = (tmp_path / "merging").iterdir()
    kept = len(json.loads(file.read_text()))
    assert 0 < kept <= 7
    with monkeypatch.context() as patch:
        calls = counted(patch)
        first, _ = merge(model, "merge-layers{macs=0.6}", calib)
    total = len(json.loads(file.read_text()))
    assert len(calls) == total - kept > 0
    with monkeypatch.context() as patch:
        calls = counted(patch)
        merge(model, "merge-layers{macs=0.4}", calib)
        again, _ = merge(model, "merge-layers{macs=0.6}", calib)
        assert not calls and str(again) == str(first)
        merge(model, "merge-layers{macs=0.6}", images(8, 12, 12))  # other data
        assert len(calls) == total


def of_the_first_output(model: go.Model) -> float:
    """Loss of a user: how many operators are left."""
    return float(len(operators(model)))


def test_a_function_of_the_users_is_asked() -> None:
    model, calib = captured(chain(), 8, 12, 12), images(8, 12, 12)
    name = f"{__name__}:{of_the_first_output.__name__}"
    _, report = merge(model, f"merge-layers{{macs=0.5,importance={name}}}", calib)
    assert all(row["loss"] == int(row["loss"]) < 0 for row in report.findings["merged"])
    with pytest.raises(UsageError, match="no importance 'nowhere:nothing'"):
        merge(model, "merge-layers{macs=0.5,importance=nowhere:nothing}", calib)


def test_candidates_can_be_trained_before_they_are_judged() -> None:
    model, calib = captured(chain(), 8, 12, 12), images(8, 12, 12)
    _, report = merge(model, "merge-layers{macs=0.5,tune=1}", calib)
    _, other = merge(model, "merge-layers{macs=0.5}", calib)
    assert [row["loss"] for row in report.findings["merged"]] != [row["loss"] for row in other.findings["merged"]]


# Batch norms


class Normed(nn.Sequential):
    """Convolutions with batch norms, wide in the middle, that are added to what goes past them."""

    def __init__(self, *last: nn.Module) -> None:
        super().__init__(
            conv(8, 48, 1, bias=False), nn.BatchNorm2d(48, eps=1e-3, momentum=0.3), nn.ReLU(),
            conv(48, 8, 3, bias=False), *last,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)
        return x + made


@pytest.mark.parametrize("norms", [0, 1])
def test_a_merged_layer_has_a_norm_where_layers_had_some(norms: int) -> None:
    net = nn.Sequential(Normed(nn.BatchNorm2d(8)) if norms else chain(), nn.ReLU(), conv(8 if norms else 4, 4, 1))
    model, calib = captured(net, 8, 12, 12), images(8, 12, 12)
    small, report = merge(model, "merge-layers{macs=0.7}", calib)
    found = [node for node in small.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert len(found) == norms and len(report.findings["merged"]) == 1
    folded, (_, *_) = go.run(small, "exact")
    assert not any(node.target is torch.ops.aten.batch_norm.default for node in folded.graph.nodes)
    assert relative_error(folded(*calib[0]), small(*calib[0])) < 1e-5
    rw = Rewriter(small)
    for node, x in zip(found, _inputs_of(small, found, calib), strict=True):
        mean, variance = (small.params[str(rw.argument(node, f"running_{name}").target)] for name in ("mean", "var"))
        assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(variance, x.var((0, 2, 3), correction=0), rtol=1e-4)
        assert not rw.argument(node, "training")


def _inputs_of(model: go.Model, nodes: list[Any], calib: Batches) -> list[Tensor]:
    """What some calls get on all calibration data."""
    names = [node.args[0].name for node in nodes]
    values = _merge_losses.values_at(model, calib, set(names))
    return [torch.cat(values[name]) for name in names]


def test_no_norm_is_added_where_one_follows() -> None:
    """The stretch ends before the second batch norm, which stays."""
    net = nn.Sequential(
        conv(8, 48, 1), nn.BatchNorm2d(48), nn.ReLU(), conv(48, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)
    )
    model = captured(net, 8, 12, 12)
    small, _ = merge(model, "merge-layers{macs=0.7}", images(8, 12, 12))
    assert operators(small).count("batch_norm") == 1


# Latency


def test_a_latency_is_planned_by_layers_and_met_by_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes by multiply-accumulates, and a start of its own for every layer."""
    from graphopt.measure import LatencyTable, Stopwatch

    def seconds(model: go.Model) -> float:
        found = layer_macs(model)
        return 2e4 * len(found) + sum(found.values())

    def of_layer(table: Any, node: Any) -> float:
        weight, out = node.args[1].meta["val"], node.args[0].meta["val"]
        return 2e4 + weight.numel() * out.shape[0] * out.shape[2] * out.shape[3]

    monkeypatch.setattr(Stopwatch, "build", lambda watch, model: model)
    monkeypatch.setattr(Stopwatch, "ratio", lambda watch, a, b, inputs: seconds(a) / seconds(b))
    monkeypatch.setattr(LatencyTable, "seconds", of_layer)
    model, calib = captured(chain(), 8, 12, 12), images(8, 12, 12)
    small, report = merge(model, "merge-layers{latency=0.6}", calib)
    assert report.findings["achieved"]["latency"] == pytest.approx(seconds(small) / seconds(model)) and report.edits
    assert 0.3 < report.findings["achieved"]["latency"] <= 0.6
    lost = [row["loss"] for row in report.findings["merged"]]
    assert report.findings["achieved"]["loss"] == pytest.approx(sum(lost))
    _, wide = merge(model, "merge-layers{latency=0.95}", calib)
    assert wide.findings["next larger plan"] == {"latency": 1.0, "loss": 0.0}  # nothing but the net as it is
    below = wide.findings["achieved"]["latency"] - 1e-6
    _, narrow = merge(model, f"merge-layers{{latency={below}}}", calib)
    assert narrow.findings["achieved"]["latency"] < 0.95 * below
    assert narrow.findings["next larger plan"] == wide.findings["achieved"]
    assert narrow.findings["achieved"]["loss"] > wide.findings["achieved"]["loss"]
