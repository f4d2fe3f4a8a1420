"""Latency budgets of `low-rank`: by a clock that is made up, so that plans can be told from measurements; and once by a
real one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.measure import LatencyTable
from graphopt.model import Model
from graphopt.ops import lookup
from graphopt.passes import _low_rank_plan
from graphopt.solve import BudgetError
from graphopt.target import Target
from graphopt.transform import Report
from tests.passes.apply import reasons

VECTOR = max(1, Target.parse("cpu").vector_bits // 32)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))


def seconds(node: Any) -> float:
    """2 microseconds for a call and one for 10,000 multiply-accumulates; layers of one tap run at half speed."""
    info = lookup(node.target)
    macs = float(info.macs(node)) if info is not None and info.macs is not None else 0.0
    taps = math.prod(node.args[1].meta["val"].shape[2:]) if len(node.args) > 1 and macs else 1
    return 2e-6 + 1e-10 * macs * (2 if taps == 1 else 1)


class Clock:
    """What compiled models are said to take: everything but the layers takes `rest`, in parts of the whole."""

    asked = 0

    def __init__(self, original: Model, _: object) -> None:
        self.whole = self.of(original)

    def of(self, model: Model) -> float:
        return sum(seconds(node) for node in layer_macs(model))

    def part(self, model: Model) -> float:
        Clock.asked += 1
        return Clock.law(self.of(model) / self.whole)

    law: Callable[[float], float] = staticmethod(lambda part: part)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(LatencyTable, "seconds", lambda _, node: seconds(node))
    monkeypatch.setattr(_low_rank_plan, "Deployed", Clock)
    monkeypatch.setattr(Clock, "asked", 0)
    return Clock


def model_of(*layers: nn.Module, size: int = 8) -> tuple[go.Model, list[tuple[torch.Tensor]]]:
    torch.manual_seed(0)
    x = nn.functional.interpolate(torch.randn(24, 16, 3, 3), size=(size, size), mode="bilinear")
    return go.capture(nn.Sequential(*layers).eval(), (x,)), [(x,)]


def wide() -> tuple[go.Model, list[tuple[torch.Tensor]]]:
    conv = nn.Conv2d
    return model_of(conv(16, 64, 3, padding=1), nn.ReLU(), conv(64, 64, 3, padding=1), nn.ReLU(), conv(64, 64, 1))


def factorise(model: go.Model, text: str, calib: Any) -> tuple[go.Model, Report]:
    small, (report,) = go.run(model, text, calib=calib)
    return small, report


@pytest.mark.parametrize("law", [lambda part: part, lambda part: 0.15 + 0.85 * part, lambda part: part**0.7])
def test_the_compiled_model_meets_the_budget(
    clock: type[Clock], monkeypatch: pytest.MonkeyPatch, law: Callable[[float], float]
) -> None:
    monkeypatch.setattr(clock, "law", staticmethod(law))
    model, calib = wide()
    small, report = factorise(model, "low-rank{latency=0.6}", calib)
    reached = report.findings["achieved"]["latency"]
    assert 0.9 * 0.6 <= reached <= 0.6
    assert reached == pytest.approx(law(Clock(model, None).of(small) / Clock(model, None).whole))
    assert all(rank % VECTOR == 0 for row in report.findings["layers"] for rank in row["rank"])
    assert 1 <= clock.asked <= 8


def test_what_is_not_faster_is_not_made_and_says_so(clock: type[Clock]) -> None:
    """3x3 from 16 channels to 24: fewer multiply-accumulates, but 1x1 runs at half speed."""
    model, calib = model_of(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 64, 3, padding=1), size=6)
    counted, _ = factorise(model, "low-rank{rank=20,forms=kxk-1x1}", calib)
    gated, report = factorise(model, "low-rank{rank=20,forms=kxk-1x1,target=cpu}", calib)
    (reason,) = reasons(report)
    assert reason.startswith("kxk-1x1 of rank 20 would take 331.8 instead of 298.6 microseconds on ")
    assert "0.factors.0.weight" in counted.params and "0.factors.0.weight" not in gated.params
    assert [row["layer"] for row in report.findings["layers"]] == ["2"]


def test_what_cannot_be_reached_says_what_was_measured(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "law", staticmethod(lambda part: 0.7 + 0.3 * part))
    model, calib = wide()
    with pytest.raises(
        BudgetError, match=r"a part of 0\.5 cannot be reached: 0\.7\d* is the smallest that was measured"
    ):
        factorise(model, "low-rank{latency=0.5}", calib)


def test_measured_by_a_real_clock() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 12) @ torch.randn(12, 512)
    model = go.capture(nn.Sequential(nn.Linear(512, 512)).eval(), (x,))
    small, report = factorise(model, "low-rank{rank=16,target=cpu,threads=1,refit=false}", [(x,)])
    assert small.params["0.factors.0.weight"].shape == (16, 512)  # a sixteenth of the work
    assert report.findings["output error"]["factorised"] < 1e-4
