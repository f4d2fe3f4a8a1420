"""Weights projected to what data uses: outputs stay, ranks fall, a second time changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import UsageError
from graphopt.passes._rank_table import rank_rows
from tests.compare import relative_error
from tests.passes.apply import gradients, reasons


def narrow(count: int, width: int, directions: int) -> Tensor:
    return torch.randn(count, directions) @ torch.randn(directions, width)


def test_ranks_fall_to_the_directions_of_the_data_and_outputs_stay() -> None:
    net = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 24), nn.Linear(24, 24)).eval()
    with torch.no_grad():
        net[1].weight[:, :16] = 0  # ranks of its own: 16
        for layer in net:
            layer.bias.zero_()
    x = narrow(200, 20, 5)
    model = go.capture(net, (x,), dynamic={0: {0: "batch"}})
    projected, (report,) = go.run(model, "project-utilized", calib=[(x,)])
    assert [(row["layer"], row["rank"], row["of"]) for row in report.findings["layers"]] == [
        ("0", 5, 20), ("1", 5, 24), ("2", 5, 24),
    ]  # fmt: skip
    ranks = [int(torch.linalg.matrix_rank(projected.params[f"{i}.weight"].double(), rtol=1e-5)) for i in range(3)]
    assert ranks == [5, 5, 5] and report.findings["output error"] < 1e-5
    for batch in (x[:7], x[:100]):
        with torch.no_grad():
            assert relative_error(projected(batch), model(batch)) < 1e-5
    assert all(gradient is not None for gradient in gradients(projected, (x,)).values())
    again, (second,) = go.run(projected, "project-utilized", calib=[(x,)])
    assert not second.changed and all("directions of its weight are used" in why for why in reasons(second))
    assert str(again) == str(projected)


def test_small_directions_go_as_far_as_the_tolerance_says() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 12, bias=False)).eval()
    x = torch.randn(400, 12) * torch.logspace(0, -5, 12)
    model = go.capture(net, (x,))
    found = []
    for tolerance in ("1e-1", "1e-3", "1e-5"):
        projected, (report,) = go.run(model, f"project-utilized{{tolerance={tolerance},only=0}}", calib=[(x,)])
        with torch.no_grad():
            a, b = (m(x).double() for m in (projected, model))
        assert report.check is None or report.check.error <= 1e-2
        assert float((a - b).norm() / b.norm()) < 2 * float(tolerance)
        found.append(report.findings["layers"][0]["rank"] if report.findings["layers"] else 12)
    assert found[0] < found[1] < found[2]


def test_groups_are_projected_each_by_itself() -> None:
    torch.manual_seed(0)
    base = torch.randn(8, 2, 9, 9)
    x = torch.cat((base[:, :1].expand(-1, 3, -1, -1), torch.randn(8, 3, 9, 9)), 1).contiguous()
    net = nn.Sequential(nn.Conv2d(6, 8, 1, groups=2)).eval()
    model = go.capture(net, (x,))
    projected, (report,) = go.run(model, "project-utilized", calib=[(x,)])
    weight = projected.params["0.weight"].flatten(1)
    assert int(torch.linalg.matrix_rank(weight[:4], rtol=1e-5)) == 1 and int(torch.linalg.matrix_rank(weight[4:])) == 3
    assert report.findings["layers"] == [{"layer": "0", "rank": 4, "of": 6}]


def test_what_stays_and_what_is_refused() -> None:
    x = torch.randn(100, 8)
    model = go.capture(nn.Sequential(nn.Linear(8, 8)).eval(), (x,))
    _, (report,) = go.run(model, "project-utilized", calib=[(x,)])
    assert not report.changed and reasons(report) == ["all 8 directions of its weight are used, of 8"]
    _, (report,) = go.run(model, "project-utilized", calib=[(torch.zeros_like(x),)])
    assert reasons(report) == ["it makes only zeros of the data"]
    with pytest.raises(UsageError, match="there is none"):
        go.run(model, "project-utilized")
    with pytest.raises(UsageError, match="tolerance is 2"):
        go.run(model, "project-utilized{tolerance=2}", calib=[(x,)])


def test_ranks_of_the_table() -> None:
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Conv1d(1, 1, 1)).eval()
    with torch.no_grad():
        left, right = torch.linalg.qr(torch.randn(16, 4)).Q, torch.linalg.qr(torch.randn(10, 4)).Q
        net[0].weight.copy_(left @ right.T)  # four equal singular values
    x = torch.linalg.qr(torch.randn(64, 10)).Q @ torch.eye(10)
    model = go.capture(nn.Sequential(net[0]).eval(), (x,))
    ((row,), left_out) = rank_rows(model, [(x,)])
    assert (row.layer, row.operator, row.outputs, row.inputs, row.full, row.rank) == ("0", "linear", 16, 10, 10, 4)
    assert row.effective == pytest.approx(4, rel=1e-5) == pytest.approx(row.data_effective, rel=1e-4)
    assert row.utilised == 4 and left_out == {}
    ((half,), _) = rank_rows(model, [(x @ right[:, :1] @ right[:, :1].T,)])  # data along one of them
    assert half.utilised == 1 and half.data_effective == pytest.approx(1, rel=1e-4) and half.rank == 4
    ((less,), _) = rank_rows(model, [(x,)], energy=0.5)
    assert less.utilised == 2
