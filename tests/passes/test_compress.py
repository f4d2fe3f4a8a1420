"""One budget over layers, widths and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.errors import UsageError
from graphopt.transform import Report
from tests.compare import relative_error

Batches = list[tuple[Tensor]]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))


def images(count: int = 3) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 8, 8),) for _ in range(count)]


def net() -> nn.Module:
    """Something for each of the ways: an inverted residual without its sum, wide layers, and a full product."""
    torch.manual_seed(0)
    conv = nn.Conv2d
    return nn.Sequential(
        conv(3, 8, 3, padding=1), nn.ReLU(),
        conv(8, 48, 1), nn.ReLU(), conv(48, 48, 3, padding=1, groups=48), nn.ReLU(), conv(48, 8, 1),
        conv(8, 24, 3, padding=1), nn.ReLU(), conv(24, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10),
    ).eval()  # fmt: skip


def compressed(text: str, module: nn.Module | None = None, calib: Batches | None = None) -> tuple[Any, Any, Report]:
    calib = images() if calib is None else calib
    model = go.capture(net() if module is None else module, (images()[0][0],), dynamic={0: {0: "batch"}})
    small, (report,) = go.run(model, text, calib=calib)
    return model, small, report


def part(small: go.Model, model: go.Model) -> float:
    return sum(layer_macs(small).values()) / sum(layer_macs(model).values())


@pytest.mark.filterwarnings("ignore:.*calibration data has:UserWarning")
def test_the_split_loses_no_more_than_any_way_alone() -> None:
    model, small, report = compressed("compress{macs=0.5}")
    found = report.findings
    assert part(small, model) == pytest.approx(found["achieved"]["macs"]) and 0.4 < part(small, model) <= 0.5
    taken = [row for row in found["tried"] if row[""] == "taken"]
    errors = [row["output error"] for row in found["tried"] if row["output error"] != "not reached"]
    assert len(taken) == 1 and taken[0]["output error"] == min(errors) and len(errors) >= 4
    (x,) = images()[0]
    with torch.no_grad():
        assert relative_error(small.call_flat((x,))[0], model.call_flat((x,))[0]) < 10 * found["output error"]


@pytest.mark.filterwarnings("ignore:.*calibration data has:UserWarning")
def test_the_passes_of_the_report_give_the_same_model() -> None:
    model, small, report = compressed("compress{macs=0.5}")
    again, _ = go.run(model, report.findings["passes"], calib=images())
    (x,) = images()[0]
    with torch.no_grad():
        assert relative_error(again.call_flat((x,))[0], small.call_flat((x,))[0]) < 1e-6


def test_what_layers_leave_of_a_budget_widths_take() -> None:
    """Some layers are one already, which loses nothing and is too little by itself."""
    torch.manual_seed(0)
    conv = nn.Conv2d
    module = nn.Sequential(
        conv(3, 16, 3, padding=1), nn.ReLU(),
        conv(16, 96, 1, bias=False), conv(96, 96, 3, padding=1, groups=96), conv(96, 16, 1), nn.ReLU(),
        conv(16, 32, 3, padding=1), nn.ReLU(), conv(32, 10, 3),
    ).eval()  # fmt: skip
    model, small, report = compressed("compress{macs=0.6,ways=merge-layers;prune-channels}", module)
    found = report.findings
    assert [text.partition("{")[0] for text in found["passes"].split(",")] == ["merge-layers", "prune-channels"]
    alone = next(row for row in found["tried"] if row["split"] == "prune-channels 4/4")
    taken = next(row for row in found["tried"] if row[""] == "taken")
    assert taken["output error"] < alone["output error"]
    assert 0.55 < part(small, model) <= 0.6


def test_one_way_is_that_pass() -> None:
    model, small, _ = compressed("compress{macs=0.5,ways=prune-channels}")
    alone, _ = go.run(model, "prune-channels{macs=0.5}", calib=images())
    (x,) = images()[0]
    with torch.no_grad():
        assert torch.equal(small.call_flat((x,))[0], alone.call_flat((x,))[0])


def test_a_latency_is_measured_on_the_whole() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 8, 3)).eval()
    _, _, report = compressed("compress{latency=0.7,threads=1,ways=prune-channels}", wide)
    assert 0.2 < report.findings["achieved"]["latency"] < 0.95


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("compress", "one budget"),
        ("compress{macs=0.5,latency=0.5}", "one budget"),
        ("compress{macs=1.5}", "between 0 and 1"),
        ("compress{macs=0.5,ways=prune-chanels}", "prune-channels"),
        ("compress{macs=0.5,ways=}", "no ways"),
        ("compress{macs=0.0001,ways=prune-channels}", "cannot be"),
    ],
)
def test_what_cannot_be_asked_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        compressed(text)


def test_without_calibration_data_nothing_can_be_compared() -> None:
    with pytest.raises(UsageError, match="calibration data"):
        compressed("compress{macs=0.5}", calib=[])


def test_training_mode_is_refused_and_the_model_stays() -> None:
    model = go.capture(net(), (images()[0][0],))
    model.train()
    with pytest.raises(UsageError, match="evaluation mode"):
        go.run(model, "compress{macs=0.5}", calib=images(), check=False)
