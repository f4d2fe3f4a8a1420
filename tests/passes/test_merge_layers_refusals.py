"""Layers that stay as they are, each with its reason, and budgets that cannot be met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import PassFailed, UsageError
from tests.passes.apply import Net, reasons
from tests.passes.test_merge_layers import captured, chain, conv, images, merge


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    model = captured(chain(), 8, 12, 12)
    with pytest.raises(UsageError, match=r"0\.01 cannot be reached: 0\.\d+ is the smallest"):
        merge(model, "merge-layers{macs=0.01}", images(8, 12, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs one budget"),
        ("macs=0.5,latency=0.5", "needs one budget"),
        ("macs=1.5", "macs is 1.5"),
        ("macs=0.5,largest=0", "largest is 0"),
        ("macs=0.5,longest=1", "longest is 1"),
    ],
)
def test_wrong_options(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge(captured(chain(), 8, 6, 6), f"merge-layers{{{options}}}", images(8, 6, 6))


def test_training_mode_and_missing_data_are_refused() -> None:
    model = captured(chain(), 8, 6, 6)
    with pytest.raises(UsageError, match="calibration data, and there is none"):
        go.run(model, "merge-layers{macs=0.5}")
    with pytest.raises(UsageError, match="evaluation mode"):
        merge(go.capture(chain().train(), (torch.randn(2, 8, 6, 6),)), "merge-layers{macs=0.5}", images(8, 6, 6))


def test_nothing_to_merge_is_said_and_nothing_edited() -> None:
    def twice(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # an activation that is read twice, and is an output
        y = torch.relu(net.a(x))
        return y, net.b(y)

    cases: list[tuple[nn.Module, tuple[int, ...], str]] = [
        (nn.Sequential(conv(4, 4), nn.ReLU()), (4, 8, 8), ""),
        (Net(twice, a=conv(4, 4), b=conv(4, 4)), (4, 8, 8), ""),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (4,), "no images with channels"),
        (nn.Sequential(conv(4, 1, 1), nn.ReLU(), conv(1, 4, 3, 2)), (4, 8, 8), "would take 4,608 instead of 1,664"),
    ]
    for net, shape, why in cases:
        model = captured(net, *shape)
        small, report = merge(model, "merge-layers{macs=0.9,largest=3}", images(*shape))
        assert not report.edits and str(small) == str(model)
        assert report.findings["merged"] == [] and "cheaper" in report.findings["nothing to merge"]
        assert any(why in reason for reason in reasons(report)) or not why, reasons(report)


def test_what_is_not_known_is_a_barrier() -> None:
    @torch.library.custom_op("merging::mystery", mutates_args=())
    def mystery(x: Tensor) -> Tensor:
        return x * 2

    mystery.register_fake(torch.empty_like)

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.after(mystery(net.before(x)))

    model = captured(Net(forward, before=chain(), after=conv(4, 4)), 8, 12, 12)
    small, report = merge(model, "merge-layers{macs=0.6}", images(8, 12, 12))
    assert "merging.mystery.default" in " ".join(map(str, (node.target for node in small.graph.nodes)))
    assert any("mystery" in reason and "not known" in reason for reason in reasons(report))
    assert all(row["to"] != "conv2d_6" for row in report.findings["merged"])


def test_a_shared_weight_stays_for_its_other_users() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.out(torch.relu(net.mid(torch.relu(net.wide(x)))))
        return net.out(torch.relu(net.mid(torch.relu(y.repeat(1, 6, 1, 1)))))

    net = Net(forward, wide=conv(8, 48, 1), mid=conv(48, 48, 3, groups=48), out=conv(48, 8, 1))
    model = captured(net, 8, 10, 10)
    small, report = merge(model, "merge-layers{macs=0.8}", images(8, 10, 10, count=8))
    assert report.findings["achieved"]["macs"] <= 0.8
    assert all(torch.equal(small.params[n], model.params[n]) for n in small.params if n in model.params)


def test_a_loss_of_nan_is_no_choice() -> None:
    net = chain()
    with torch.no_grad():
        net[0].weight.fill_(3e38)
    model = captured(net, 8, 6, 6)
    with pytest.raises((UsageError, PassFailed)):
        merge(model, "merge-layers{macs=0.5}", images(8, 6, 6))
