"""Input that is wrong for `low-rank`: each is refused, or warned about, by name and with numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import InputError, PassFailed, UsageError
from graphopt.passes._covariance import Moments, moments_of
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.rewriter import Rewriter
from tests.passes.apply import reasons


def net(width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16)).eval()


def run(module: nn.Module, options: str, calib: list[tuple[Tensor, ...]], example: Tensor | None = None) -> None:
    model = go.capture(module, (torch.randn(30, 16) if example is None else example,), dynamic={0: {0: "batch"}})
    go.run(model, f"low-rank{{{options}}}", calib=calib)


DATA = [(torch.randn(30, 16),)]


@pytest.mark.parametrize(("options", "message"), [
    ("", "it needs one budget"),
    ("params=0.5,macs=0.5", "it needs one budget"),
    ("params=0", "params is 0, it has to be between 0 and 1"),
    ("macs=1", "macs is 1, it has to be between 0 and 1"),
    ("energy=1.5", "energy is 1.5"),
    ("rank=0", "rank is 0, it has to be a whole number from 1 on"),
    ("rank=-3", "rank is -3"),
    ("rank=2.5", "rank is 2.5"),
    ("rank=17", "rank is 17, the largest that a layer has is 16"),
    ("params=0.5,step=0", "step is 0"),
    ("params=0.5,forms=linaer", "there is no form 'linaer'"),
    ("rank=4,allocation=minimax", "there is nothing to allocate"),
    ("latency=0.5,allocation=alds", "ALDS counts parameters or multiply-accumulates"),
    ("params=0.5,leave=conv", "no layer that could be factorised is called 'conv'"),
    ("latency=0.5,target=cortex-a72", "cannot be measured here"),
])  # fmt: skip
def test_options_that_cannot_be(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(net(), options, DATA)


@pytest.mark.parametrize("options", ["rank=4,solver=activation", "rank=4,solver=fisher", "rank=4,refit=true"])
def test_what_needs_data(options: str) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        run(net(), options, [])


def test_without_data_the_weight_alone_is_looked_at() -> None:
    model = go.capture(net(), DATA[0])
    small, (report,) = go.run(model, "low-rank{params=0.7}")
    assert report.findings["solver"] == "svd" and "output error" not in report.findings
    (row, *_) = report.findings["layers"]
    weight = model.params["0.weight"].detach().double()
    if row["layer"] == "2":
        weight = model.params["2.weight"].detach().double()
    squares = torch.linalg.svdvals(weight).square()
    assert row["error"] ** 2 == pytest.approx(float(squares[row["rank"][0] :].sum() / squares.sum()), rel=1e-6)
    assert small is not model


def test_training_mode() -> None:
    model = go.capture(net().train(), DATA[0])
    with pytest.raises(UsageError, match="evaluation mode"):
        go.run(model, "low-rank{rank=4}", calib=DATA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    module = net()
    with torch.no_grad():
        module[2].weight[3, 5] = bad
    for calib in ([], DATA):
        with pytest.raises((InputError, PassFailed), match="the weight of '2' is not finite"):
            run(module, "rank=4", calib)


def test_activations_that_are_not_finite() -> None:
    module = net()
    with torch.no_grad():
        module[0].weight.fill_(3e38)
    with pytest.raises(InputError, match="what '2' reads is not finite on the calibration data"):
        run(module, "rank=4,only=2", [(torch.full((30, 16), 4.0),)])


def test_data_of_another_shape_or_dtype_or_with_nan() -> None:
    for wrong in (torch.randn(30, 15), torch.randn(30, 16, dtype=torch.float64)):
        with pytest.raises(InputError, match="calibration batch 0"):
            run(net(), "rank=4", [(wrong,)])
    with pytest.raises(InputError, match="holds NaN"):
        run(net(), "rank=4", [(torch.full((30, 16), float("nan")),)])


def test_too_few_samples_are_told_with_numbers() -> None:
    with pytest.warns(UserWarning, match=r"'2' reads 24 numbers and the calibration data has 20 rows of them"):
        run(net(), "rank=4,only=2", [(torch.randn(20, 16),)], torch.randn(20, 16))
    with pytest.warns(UserWarning) as told:
        run(net(), "rank=4", [(torch.randn(11, 16),)])
    assert {str(one.message).split("'")[1] for one in told} == {"0", "2"}


def test_singular_moments_are_no_trouble() -> None:
    """Fewer directions than features, one feature that is constant, one that is zero, and all the same row."""
    x = torch.randn(60, 3) @ torch.randn(3, 16)
    x[:, 4], x[:, 5] = 1.0, 0.0
    for data in (x, x[:1].expand(60, 16).contiguous(), torch.zeros(60, 16)):
        model = go.capture(net(), (data,))
        small, (report,) = go.run(model, "low-rank{rank=4,only=0}", calib=[(data,)])
        assert report.changed and torch.allclose(small(data), model(data), atol=1e-4)
        assert all(bool(torch.isfinite(p).all()) for p in small.parameters())


def test_a_model_without_layers() -> None:
    model = go.capture(nn.Sequential(nn.ReLU()).eval(), DATA[0])
    _, (report,) = go.run(model, "low-rank{rank=4}", calib=DATA)
    assert not report.changed and reasons(report) == []


# Moments


def moments(module: nn.Module, batches: list[tuple[Tensor, ...]]) -> Moments:
    model = go.capture(module.eval(), batches[0], dynamic={0: {0: "batch"}})
    ((node, whole),) = find_layers(Rewriter(model))
    assert isinstance(whole, Whole)
    ((_, found),) = moments_of(model, batches, {node: whole})
    return found


def test_moments_do_not_depend_on_how_the_data_is_cut() -> None:
    x = torch.randn(12, 4, 9, 7)
    conv = nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2)
    whole, cut = moments(conv, [(x,)]), moments(conv, [(x[:5],), (x[5:6],), (x[6:],)])
    assert whole.count == cut.count == 12 * 5 * 5 and whole.sum.shape == (2, 12, 12)
    assert torch.allclose(whole.sum, cut.sum, rtol=1e-12)
    weight, y = (
        conv.weight.detach().double().reshape(2, 3, 12),
        conv(x).detach().double() - conv.bias.double()[:, None, None],
    )
    made = torch.einsum("gmn,gnk,gmk->gm", weight, whole.sum, weight).flatten()
    assert torch.allclose(made, y.square().sum((0, 2, 3)).detach(), rtol=1e-5)


def test_layers_that_read_one_value_share_their_moments() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.q(x), self.k(x), self.v(torch.relu(x))), -1)

    x = torch.randn(20, 8)
    model = go.capture(Three().eval(), (x,))
    layers = {node: whole for node, whole in find_layers(Rewriter(model)) if isinstance(whole, Whole)}
    found = {whole.name: m for (_, m), whole in zip(moments_of(model, [(x,)], layers), layers.values(), strict=True)}
    assert found["q"] is found["k"] and found["v"] is not found["q"]
