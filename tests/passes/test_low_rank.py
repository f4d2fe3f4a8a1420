"""Factors in the place of layers: budgets that are kept, ranks chosen together, what stays and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.errors import UsageError
from graphopt.solve import BudgetError
from graphopt.transform import Report
from tests.compare import relative_error
from tests.passes.apply import Net, errors_at, gradients, operators, reasons

Batches = list[tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def convolutional() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.ReLU(), conv(16, 32, stride=2), nn.ReLU(), conv(32, 32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def smooth(count: int = 24) -> Tensor:
    """Images that vary slowly, so that windows of them have few directions."""
    return F.interpolate(torch.randn(count, 3, 3, 3), size=(12, 12), mode="bilinear")


def captured(net: nn.Module, x: Tensor) -> go.Model:
    return go.capture(net, (x,), dynamic={0: {0: "batch"}})


def factorise(model: go.Model, options: str, calib: Batches) -> tuple[go.Model, Report]:
    small, (report,) = go.run(model, f"low-rank{{{options}}}", calib=calib)
    return small, report


def lost(small: go.Model, model: go.Model, x: Tensor) -> float:
    with torch.no_grad():
        a, b = small(x), model(x)
        return float(((a - b).square().sum() / b.square().sum()).sqrt())


# Budgets


@pytest.mark.filterwarnings("ignore:.*rows of them")
@pytest.mark.parametrize("allocation", ["solve", "minimax", "alds"])
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_budgets_are_kept(budget: str, allocation: str) -> None:
    x = smooth()
    model = captured(convolutional(), x)
    small, report = factorise(model, f"{budget}=0.6,allocation={allocation}", [(x,)])
    counted = {
        "params": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()),
        "macs": sum(layer_macs(small).values()) / sum(layer_macs(model).values()),
    }
    assert 0.45 < counted[budget] <= 0.6 and report.findings["achieved"][budget] == pytest.approx(counted[budget])
    rows = report.findings["layers"]
    assert rows and all(1 <= rank < full for row in rows for rank, full in zip(row["rank"], row["of"], strict=True))
    assert lost(small, model, smooth()) < 0.35


@pytest.mark.filterwarnings("ignore:.*rows of them")
def test_less_is_lost_of_a_larger_budget_and_with_data() -> None:
    x = smooth()
    model = captured(convolutional(), x)
    errors = [factorise(model, f"macs={part},refit=false", [(x,)])[1].findings for part in (0.8, 0.5, 0.3)]
    found = [one["output error"]["factorised"] for one in errors]
    assert found[0] < found[1] < found[2]
    plain = factorise(model, "macs=0.5,refit=false,solver=svd", [(x,)])[1].findings["output error"]["factorised"]
    assert found[1] < 0.7 * plain
    alds = factorise(model, "macs=0.5,refit=false,allocation=alds", [(x,)])[1]
    assert found[1] < alds.findings["output error"]["factorised"]
    assert alds.findings["solver"] == "svd"  # what it looks at are weights alone


def test_a_budget_out_of_reach_names_the_smallest() -> None:
    x = smooth()
    model = captured(convolutional(), x)
    with pytest.raises(BudgetError, match=r"0\.001 cannot be reached: 0\.\d+ is the smallest that can be"):
        factorise(model, "params=0.001", [(x,)])
    smallest = 0.08
    with pytest.raises(BudgetError) as error:
        factorise(model, "params=0.001", [(x,)])
    smallest = float(error.value.what.split(": ")[1].split()[0])
    assert factorise(model, f"params={smallest * 1.06:.4f}", [(x,)])[1].changed


@pytest.mark.filterwarnings("ignore:.*rows of them")
def test_the_part_of_the_energy_that_has_to_stay() -> None:
    x = smooth()
    model = captured(convolutional(), x)
    for kept in (0.9, 0.99):
        small, report = factorise(model, f"energy={kept},refit=false", [(x,)])
        assert report.findings["layers"] and all(row["error"] ** 2 <= 1 - kept for row in report.findings["layers"])
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


def test_a_rank_of_ones_own() -> None:
    torch.manual_seed(1)
    x = torch.randn(64, 32)
    net = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 6)).eval()
    model = captured(net, x)
    small, report = factorise(model, "rank=8", [(x,)])
    assert [(row["layer"], row["rank"]) for row in report.findings["layers"]] == [("0", [8])]
    assert reasons(report) == ["pivoted of rank 6 would take 288 instead of 288 parameters"]
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {
        "0.factors.0.weight": (8, 32), "0.factors.1.weight": (40, 8), "0.bias": (48,),
        "2.weight": (6, 48), "2.bias": (6,),
    }  # fmt: skip
    assert sorted(small.params["0.factors.order"].tolist()) == list(range(48))
    plain, _ = factorise(model, "rank=8,forms=linear", [(x,)])
    assert plain.params["0.factors.1.weight"].shape == (48, 8)
    assert lost(small, model, x) == pytest.approx(lost(plain, model, x), rel=1e-3)
    half, _ = factorise(model, "rank=0.5", [(x,)])
    assert half.params["0.factors.0.weight"].shape == (16, 32)


# What becomes of a model


@pytest.mark.filterwarnings("ignore:.*rows of them")
def test_the_result_is_an_ordinary_model(tmp_path: Path) -> None:
    x = smooth()
    net = convolutional()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    model = captured(net, x)
    small, _ = factorise(model, "params=0.5", [(x,)])
    assert small(smooth(1)).shape == (1, 5) and small(smooth(7)).shape == (7, 5)
    found = gradients(small, (smooth(3),))
    assert found and all(gradient is not None and bool(gradient.any()) for gradient in found.values())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    small.save(tmp_path / "small.gopt")
    again = go.load(tmp_path / "small.gopt")
    assert relative_error(again(x), small(x)) == 0
    with pytest.raises(BudgetError):  # factors stay factors, by their names
        factorise(again, "params=0.5", [(x,)])


def test_twice_is_once() -> None:
    x = torch.randn(80, 24)
    model = captured(nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24)).eval(), x)
    small, _ = factorise(model, "rank=6", [(x,)])
    twice, report = factorise(small, "rank=3", [(x,)])
    assert not report.changed and str(twice) == str(small)
    assert reasons(report) == [f"'{n}.factors.{i}.weight' is a factor already" for n in (0, 2) for i in (0, 1)]


def test_a_bottleneck_that_was_there_before_is_no_layer_to_factorise() -> None:
    x = torch.randn(60, 32)
    for width, alone in ((4, True), (15, True), (16, False)):  # 32 * 32 = 64 * 16: break-even
        net = nn.Sequential(nn.Linear(32, width), nn.Linear(width, 32)).eval()
        _, report = factorise(captured(net, x), "rank=2", [(x,)])
        assert report.changed != alone
        assert [reason for reason in reasons(report) if "factors of one layer already" in reason] == (
            ["it and 'linear_1' are factors of one layer already", "'linear' and it are factors of one layer already"]
            if alone
            else []
        )
    net = nn.Sequential(nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 32)).eval()  # something in between
    assert not [r for r in reasons(factorise(captured(net, x), "rank=2", [(x,)])[1]) if "already" in r]


def test_a_fused_projection_of_queries_keys_and_values() -> None:
    torch.manual_seed(2)

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        return net.out(F.scaled_dot_product_attention(q, k, v))

    net = Net(forward, qkv=nn.Linear(48, 144), out=nn.Linear(48, 48))
    x = torch.randn(8, 20, 12) @ torch.randn(12, 48)  # twelve directions
    model = captured(net, x)
    small, report = factorise(model, "params=0.6", [(x,)])
    assert report.findings["layers"][0]["layer"] == "qkv"
    assert errors_at(net, small, (x[:3],)) < 1e-4 and errors_at(net, small, (x,)) < 1e-4
    assert lost(small, model, x) < 1e-5 and operators(small).count("linear") == 4


def test_products_with_a_stored_matrix() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(net.b, x, net.w, alpha=0.5)) @ net.v

    torch.manual_seed(0)
    net = Net(
        forward,
        w=nn.Parameter(torch.randn(24, 40)),
        b=nn.Parameter(torch.randn(40)),
        v=nn.Parameter(torch.randn(40, 30)),
    )
    x = torch.randn(64, 4) @ torch.randn(4, 24)
    small, report = factorise(captured(net, x), "rank=6,forms=linear", [(x,)])
    assert [row["layer"] for row in report.findings["layers"]] == ["addmm", "matmul"]
    assert sorted(small.params) == [
        "b",
        "v_factors.0.weight",
        "v_factors.1.weight",
        "w_factors.0.weight",
        "w_factors.1.weight",
    ]
    first, _ = factorise(captured(net, x), "rank=6,only=addmm", [(x,)])
    assert errors_at(net, first, (x,)) < 1e-4


def test_grouped_and_depthwise_convolutions() -> None:
    """Each group is factorised by itself; its error is at most that of a dense layer's best."""
    torch.manual_seed(0)
    x = torch.randn(6, 12, 9, 9)
    net = nn.Sequential(conv(12, 24, groups=3), nn.ReLU(), conv(24, 24, 7, groups=24)).eval()
    model = captured(net, x)
    small, report = factorise(model, "rank=2,forms=kxk-1x1;1xk-kx1,refit=false", [(x,)])
    assert [(row["layer"], row["form"]) for row in report.findings["layers"]] == [
        ("0", "kxk-1x1"),
        ("2", "1xk-kx1"),
    ] or [row["form"] for row in report.findings["layers"]] == ["1xk-kx1", "1xk-kx1"]
    assert small.params["2.factors.0.weight"].shape == (48, 1, 1, 7)
    assert small.params["2.factors.1.weight"].shape == (24, 2, 7, 1)
    predicted = report.findings["layers"][0]["error"]
    only, one = factorise(model, "rank=2,forms=kxk-1x1;1xk-kx1,refit=false,only=0", [(x,)])
    head = captured(net[0], x)
    cut, row = factorise(head, "rank=2,forms=kxk-1x1;1xk-kx1,refit=false", [(x,)])
    with torch.no_grad():
        bias = net[0].bias.reshape(-1, 1, 1)
        measured = ((cut(x) - head(x)).square().sum() / (head(x) - bias).square().sum()).sqrt()
    assert float(measured) == pytest.approx(predicted, rel=1e-4) == row.findings["layers"][0]["error"]
    assert one.changed and only is not None


# What stays


def test_what_is_shared_or_no_layer_stays() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.up(torch.relu(net.twice(torch.relu(net.twice(x)))))
        return F.linear(y, net.given * 2)

    torch.manual_seed(0)
    net = Net(forward, twice=nn.Linear(32, 32), up=nn.Linear(32, 64), given=nn.Parameter(torch.randn(8, 64)))
    x = torch.randn(40, 32)
    _, report = factorise(captured(net, x), "rank=4", [(x,)])
    assert [row["layer"] for row in report.findings["layers"]] == ["up"]
    assert [miss.node for miss in report.misses] == ["linear", "linear_1", "linear_3"]
    assert "'twice.weight' is also used by 'linear_1'" in reasons(report)[0]
    assert "the weight of 'linear_3' is computed" in reasons(report)[2]
    net = nn.Sequential(nn.ConvTranspose2d(8, 8, 3)).eval()
    x = torch.randn(2, 8, 5, 5)
    assert "transposed convolution" in reasons(factorise(captured(net, x), "rank=4", [(x,)])[1])[0]


class _Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_tables_stay(tied: bool) -> None:
    torch.manual_seed(0)
    x = torch.randint(50, (12, 9))
    model = go.capture(_Tied(tied).eval(), (x,))
    small, report = factorise(model, "rank=4,forms=embedding;linear", [(x,)])
    assert report.changed != tied
    if tied:
        assert reasons(report)[0].startswith("'head.weight' is also used by 'linear'")
        assert "both sides" in reasons(report)[0] and "also used by 'embedding'" in reasons(report)[1]
    else:
        assert operators(small) == ["embedding", "linear", "tanh", "linear", "linear"]
        assert {row["form"] for row in report.findings["layers"]} == {"embedding", "linear"}


def test_only_and_leave() -> None:
    x = smooth()
    model = captured(
        nn.Sequential(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16)), nn.ReLU(), conv(16, 16)).eval(), x
    )

    def layers(options: str) -> list[str]:
        return [row["layer"] for row in factorise(model, f"rank=2,{options}", [(x,)])[1].findings["layers"]]

    assert (
        layers("only=0") == ["0.0", "0.2"]
        and layers("leave=0") == ["2"]
        and layers("only=0;2,leave=0.2") == ["0.0", "2"]
    )
    with pytest.raises(UsageError, match="no layer that could be factorised is called 'conv9'"):
        layers("only=conv9")


@pytest.mark.parametrize(
    "form", ["kxk-1x1", "1xk-kx1", "kx1-1xk", "1x1-kxk", "grouped", "tucker", "cp", "tt", "embedding", "pivoted"]
)
def test_every_form_can_be_asked_for(form: str) -> None:
    torch.manual_seed(0)
    if form in ("tt", "embedding"):
        x = torch.randint(60, (4, 7))
        net: nn.Module = nn.Sequential(nn.Embedding(64, 36), nn.Linear(36, 36))
    else:
        x, net = torch.randn(4, 12, 9, 9), nn.Sequential(conv(12, 18, bias=False), nn.ReLU(), conv(18, 12, stride=2))
    model = captured(net.eval(), x)
    small, report = factorise(model, f"params=0.7,forms={form}", [(x,)])
    assert {row["form"] for row in report.findings["layers"]} == {form}
    batch = x[:3].flip(0)
    assert small(batch).shape == model(batch).shape and lost(small, model, x) < 0.75
    assert all(gradient is not None for gradient in gradients(small, (x,)).values())
