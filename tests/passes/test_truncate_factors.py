"""Truncation of factors: to which rank, that nothing changes, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.check import relative_error
from graphopt.errors import UsageError
from graphopt.passes.truncate_factors import TruncateFactors


def of_rank(first: nn.Module, second: nn.Module, rank: int) -> nn.Sequential:
    """Two layers whose product has a rank, spread over all rows of the first one."""
    with torch.no_grad():
        rows = first.weight.flatten(1)
        bias = getattr(first, "bias", None)
        rows = rows if bias is None else torch.cat([rows, bias[:, None]], 1)
        mixed = torch.randn(len(rows), rank).to(rows) @ rows[:rank]
        if bias is not None:
            bias.copy_(mixed[:, -1])
            mixed = mixed[:, :-1]
        first.weight.copy_(mixed.reshape(first.weight.shape))
    return nn.Sequential(first, second).eval()


def truncated(net: nn.Module, x: Tensor, text: str = "truncate-factors") -> tuple[go.Model, go.Model, Any]:
    model = go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}})
    small, (report,) = go.run(model, text)
    return model, small, report


def reasons(net: nn.Module, x: Tensor) -> str:
    _, _, report = truncated(net, x)
    assert not report.changed and report.findings["layers"] == []
    return " | ".join(miss.reason for miss in report.misses)


@settings(deadline=None, max_examples=10)
@given(
    out=st.integers(1, 6), width=st.integers(2, 7), inputs=st.integers(1, 6), rank=st.integers(1, 6),
    kernels=st.sampled_from([(0, 0), (1, 3), (3, 1), (3, 3)]), bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_pair_is_cut_to_the_rank_of_its_product(
    out: int, width: int, inputs: int, rank: int, kernels: tuple[int, int], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    k1, k2 = kernels
    if k1:
        pads = 0 if bias else k2 // 2
        pair = nn.Conv1d(inputs, width, k1, padding=1, stride=2, bias=bias), nn.Conv1d(width, out, k2, padding=pads)
    else:
        pair = nn.Linear(inputs, width, bias=bias), nn.Linear(width, out)
    rank = min(rank, width)
    net = of_rank(pair[0].double(), pair[1].double(), rank)
    x = torch.randn(3, inputs, 11).double() if k1 else torch.randn(3, inputs).double()
    model, small, report = truncated(net, x)
    columns = pair[0].weight[0].numel() + bias
    wanted = min(rank, columns, out * max(k2, 1))
    assert small.params["0.weight"].shape[0] == small.params["1.weight"].shape[1] == wanted
    for some in (x, torch.cat([x, -x])):
        assert relative_error(small(some), model(some)) < 1e-10
    assert report.changed == (wanted < width)
    again, (second,) = go.run(small, "truncate-factors")
    assert not second.changed and again.params["0.weight"].shape[0] == wanted


def test_eps_is_relative_to_the_largest_singular_value_and_bounds_the_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Linear(6, 8, bias=False)).double()
    left, right = torch.linalg.qr(torch.randn(8, 6).double()).Q, torch.linalg.qr(torch.randn(9, 6).double()).Q
    values = torch.tensor([5.0, 2.0, 1.0, 0.02, 0.004, 1e-9]).double()
    mix = torch.randn(6, 6).double()
    with torch.no_grad():
        net[1].weight.copy_(left * values @ mix)
        net[0].weight.copy_(torch.linalg.inv(mix) @ right.T)
    x = torch.eye(9).double()
    for eps, rank in (("1e-9", 5), ("0.0009", 4), ("0.01", 3), ("0.3", 2)):
        model, small, report = truncated(net, x, f"truncate-factors{{eps={eps}}}")
        (row,) = report.findings["layers"]
        assert (row["rank"], row["of"], small.params["0.weight"].shape[0]) == (rank, 6, rank)
        assert row["tail"] == pytest.approx(float(values[rank]) / 5, rel=1e-6)
        error = torch.linalg.matrix_norm((small(x) - model(x)).detach(), 2)
        assert float(error) == pytest.approx(float(values[rank]), rel=1e-5)
    assert TruncateFactors().contract.name == "exact" and TruncateFactors(eps=1e-12).contract.name == "lossy"


def test_products_with_stored_matrices_and_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(7, 2) @ torch.randn(2, 5)), nn.Parameter(torch.randn(5, 6))
            self.c = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.c, x @ self.a, self.b)

    torch.manual_seed(0)
    x = torch.randn(4, 7)
    model, small, report = truncated(Net(), x)
    assert len(report.edits) == 2 and [list(small.params[n].shape) for n in "ab"] == [[7, 2], [2, 6]]
    assert relative_error(small(x), model(x)) < 1e-5
    small.module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())


def test_what_low_rank_has_made_stays_and_the_rest_of_the_net_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    factors, _ = go.run(go.capture(net.eval(), (x,)), "low-rank{rank=4,forms=kxk-1x1}")
    again, (report,) = go.run(factors, "truncate-factors")
    assert not report.changed and "all 4 directions of the product are used" in str(report.misses)
    assert again(x).equal(factors(x))


class Read(nn.Module):
    """A net whose value in the middle has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = of_rank(nn.Linear(6, 4), nn.Linear(4, 4), 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.a(x)
        return self.b(inner) + inner


def test_what_is_left_alone() -> None:
    torch.manual_seed(0)
    x, image = torch.randn(3, 6), torch.randn(2, 3, 8, 8)
    conv, linear = nn.Conv2d, nn.Linear
    assert "is read by others too" in reasons(Read(), x)
    pair = of_rank(linear(6, 4), linear(4, 5), 2)
    assert "'relu' stands between 'linear' and it" in reasons(nn.Sequential(pair[0], nn.ReLU(), pair[1]), x)
    biased = of_rank(conv(3, 6, 1), conv(6, 4, 3, padding=1), 2)
    assert "adds a bias, and 'conv2d_1' pads with zeros" in reasons(biased, image)
    normed = nn.Sequential(conv(3, 6, 3), nn.BatchNorm2d(6), conv(6, 4, 1))
    assert "'batch_norm' stands between" in reasons(normed, image)
    grouped = of_rank(conv(3, 6, 1, bias=False), conv(6, 4, 1, groups=2), 2)
    assert "'conv2d' or 'conv2d_1' has groups" in reasons(grouped, image)
    tied = nn.Sequential(linear(6, 6, bias=False), linear(6, 6, bias=False))
    tied[1].weight = tied[0].weight
    assert "'1.weight' is" in (text := reasons(tied, x)) or "'0.weight' is" in text
    broken = of_rank(linear(6, 4), linear(4, 5), 2)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    assert "are not finite" in reasons(broken, x)
    full = nn.Sequential(linear(6, 4), linear(4, 5))
    assert "all 4 directions of the product are used" in reasons(full, x)


def test_near_misses_are_truncated() -> None:
    """Beside what is left alone: a bias where the second layer does not pad, padding without a bias."""
    torch.manual_seed(0)
    x, conv = torch.randn(2, 3, 8, 8), nn.Conv2d
    for first, second in (
        (conv(3, 6, 3, padding=1), conv(6, 4, 3)),
        (conv(3, 6, 1, bias=False), conv(6, 4, 3, padding=1)),
        (conv(3, 6, 3, padding=1, bias=False, dilation=2), conv(6, 4, 1, stride=2)),
    ):
        model, small, report = truncated(of_rank(first, second, 2), x)
        assert report.changed and small.params["0.weight"].shape[0] == 2
        assert relative_error(small(x), model(x)) < 1e-5


def test_a_product_of_zeros_keeps_one_direction() -> None:
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 5))
    nn.init.zeros_(net[0].weight)
    model, small, report = truncated(net, torch.randn(3, 6))
    assert report.findings["layers"] == [{"layers": ["0", "1"], "rank": 1, "of": 4, "tail": 0.0}]
    assert small(torch.ones(2, 6)).equal(model(torch.ones(2, 6)))


@pytest.mark.parametrize("eps", [-1e-9, 1.0, float("nan")])
def test_bad_eps(eps: float) -> None:
    with pytest.raises(UsageError, match=r"eps of 'truncate-factors'"):
        TruncateFactors(eps=eps)
