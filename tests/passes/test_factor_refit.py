"""Factors fitted to what the original layers make: the optimum, biases, what is shared, what does not help."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.passes import _factor_refit
from tests.compare import relative_error


def factorise(net: nn.Module, x: Tensor, options: str) -> tuple[go.Model, dict[str, float]]:
    model = go.capture(net.eval(), (x,))
    small, (report,) = go.run(model, f"low-rank{{{options}}}", calib=[(x,)])
    return small, report.findings["output error"]


def product(small: go.Model, layer: int) -> Tensor:
    """The matrix that the factors of a layer multiply to, [out, in]."""
    first, second = (small.params[f"{layer}.factors.{place}.weight"].detach() for place in (0, 1))
    return second @ first


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 9), st.integers(3, 9), st.integers(1, 2), st.booleans(), st.integers(0, 99))
def test_it_is_reduced_rank_regression(inputs: int, outputs: int, rank: int, bias: bool, seed: int) -> None:
    """The second layer, on what the first one makes now, is as near to what it made as any of its rank can be."""
    torch.manual_seed(seed)
    x = torch.randn(32 * min(inputs, 8), inputs, dtype=torch.float64) + 0.5
    net = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs, bias=bias)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_factor_refit, "_RIDGES", (1e-10,))
        small, errors = factorise(net, x, f"rank={rank},forms=linear,solver=activation")
    assume(errors["refitted"] < errors["factorised"])  # else it is not kept
    with torch.no_grad():
        read = torch.relu(x @ product(small, 0).T + small.params["0.bias"])
        wanted, made = net(x), small(x)
        if bias:
            read, wanted, made = (values - values.mean(0) for values in (read, wanted, made))
        fitted = read @ torch.linalg.lstsq(read, wanted, driver="gelsd").solution
        left = torch.linalg.svdvals(fitted)[rank:].square().sum() + (wanted - fitted).square().sum()
        error = (wanted - made).square().sum()
    assert error <= left * 1.002 + 1e-12 * wanted.square().sum()
    assert error >= left * (1 - 1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_fitted_at_their_borders_as_well(groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
    ).double()  # fmt: skip
    x = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    small, errors = factorise(net, x, "rank=0.5,forms=kxk-1x1,solver=activation")
    assert errors["refitted"] < 0.95 * errors["factorised"]
    with torch.no_grad():
        wanted, made = net(x), small(x)
    assert errors["refitted"] == pytest.approx(float((wanted - made).norm() / wanted.norm()), rel=1e-9)


def test_without_factors_before_it_a_layer_is_what_the_data_says() -> None:
    """Nothing has changed in front of the only layer: fitting moves nothing but the bias, by what the mean loses."""
    torch.manual_seed(1)
    x = torch.randn(150, 6, dtype=torch.float64) + 1.0
    net = nn.Sequential(nn.Linear(6, 5)).double()
    plain, before = factorise(net, x, "rank=2,forms=linear,solver=activation,refit=false")
    small, errors = factorise(net, x, "rank=2,forms=linear,solver=activation")
    assert errors["factorised"] == pytest.approx(before["factorised"]) and errors["refitted"] < errors["factorised"]
    with torch.no_grad():
        assert float((net(x) - small(x)).mean(0).abs().max()) < 1e-6  # the bias makes up for the mean
        assert float((net(x) - plain(x)).mean(0).abs().max()) > 1e-3


class OneBias(nn.Module):
    """Two products with stored matrices, to which the same is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, torch.tanh(torch.addmm(self.bias, x, self.first)), self.second)


def test_a_bias_that_others_use_stays() -> None:
    torch.manual_seed(2)
    net = OneBias().double()
    small, errors = factorise(net, torch.randn(150, 6, dtype=torch.float64), "rank=2,forms=linear,solver=activation")
    assert torch.equal(small.params["bias"], net.bias)
    assert errors["refitted"] < errors["factorised"]


def test_what_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(200, 6)
    plain, _ = factorise(net, x, "rank=2,forms=linear,solver=activation,refit=false")
    right = _factor_refit._Fit.found

    def wrong(fit: _factor_refit._Fit) -> Iterator[tuple[torch.fx.Node, Tensor]]:
        yield from ((node, -value) for node, value in right(fit))

    monkeypatch.setattr(_factor_refit._Fit, "found", wrong)
    small, errors = factorise(net, x, "rank=2,forms=linear,solver=activation")
    assert errors["refitted"] > errors["factorised"]
    assert all(torch.equal(small.params[name], plain.params[name]) for name in plain.params)
    with torch.no_grad():
        assert relative_error(small(x), plain(x)) == 0


def test_few_samples_do_not_lead_astray() -> None:
    """Eight rows cannot tell thirty numbers: what they do not show stays near the original on other data."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 8)).double()
    x, other = torch.randn(8, 30, dtype=torch.float64), torch.randn(200, 30, dtype=torch.float64)
    model = go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}})
    with pytest.warns(UserWarning, match="reads 30 numbers and the calibration data has 8 rows"):
        small, plain = (
            go.run(model, f"low-rank{{rank=12,forms=linear,solver=activation{more}}}", calib=[(x,)])[0]
            for more in ("", ",refit=false")
        )
    with torch.no_grad():
        errors = [float((net(other) - one(other)).norm() / net(other).norm()) for one in (small, plain)]
    assert errors[0] < 1.1 * errors[1]
