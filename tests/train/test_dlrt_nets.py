"""DLRT on nets: the other parameters, checkpoints, weights changed from outside, failures, captured models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.check import relative_error
from graphopt.errors import UsageError
from graphopt.train import DLRT, Diverged, as_factors
from graphopt.train.checkpoint import load_checkpoint, save_checkpoint
from graphopt.verify import verify
from tests.train.test_dlrt import closure_of, halved, planted, product, small_net


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        made: Tensor = self.head(self.inner(x).relu())
        return made


def images(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(count)]
    return [(x, x.mean((2, 3)).argmax(1)) for x in found]


def factors(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return as_factors(Net(), 0.5)[0]


def train(net: nn.Module, optimizer: DLRT, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(optimizer.step(closure_of(net, x, y, F.cross_entropy))) for x, y in data]


def test_other_parameters_are_trained_once_a_step() -> None:
    """With factors at full rank a net learns what it would without them."""
    torch.manual_seed(0)
    whole = Net().double().eval()
    net, _ = as_factors(whole, leave=("inner",))
    data = [(x.double(), y) for x, y in images(5)]
    optimizer, plain = DLRT(net, 0.1, tau=0.0), torch.optim.SGD(whole.parameters(), 0.1)
    train(net, optimizer, data)
    for x, y in data:
        plain.zero_grad()
        closure_of(whole, x, y, F.cross_entropy)()
        plain.step()
    theirs = dict(whole.named_parameters())
    for name in ("norm.weight", "norm.bias", "inner.weight", "inner.bias"):
        assert torch.allclose(net.get_parameter(name), theirs[name], atol=1e-10)
    assert torch.allclose(net.conv.weight, whole.conv.weight, atol=1e-10)


@pytest.mark.parametrize(("rule", "stop"), [("sgd", 3), ("adam", 12)])
def test_a_training_that_was_broken_off_ends_as_if_it_had_not_been(rule: str, stop: int, tmp_path: Path) -> None:
    data = images(20)
    options: dict[str, Any] = {"lr": 0.05, "tau": 0.1, "rule": rule} | ({"momentum": 0.9} if rule == "sgd" else {})
    through, first, second = factors(), factors(), factors(seed=1)
    whole = DLRT(through, **options)
    losses = train(through, whole, data)
    before = DLRT(first, **options)
    train(first, before, data[:stop])
    state = {"optimizer": before.state_dict(), "net": dict(first.state_dict())}
    save_checkpoint(tmp_path / "run", state)
    train(first, before, data[stop:])  # what was saved must not change with it
    saved = load_checkpoint(tmp_path / "run")
    after = DLRT(second, **options)
    after.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["net"])
    assert train(second, after, data[stop:]) == losses[stop:] and after.ranks() == whole.ranks()
    end = second.state_dict()
    assert all(torch.equal(tensor, end[name]) for name, tensor in through.state_dict().items())
    other = "adam" if rule == "sgd" else "sgd"
    with pytest.raises(UsageError, match=f"not one of DLRT with {other.upper() if other == 'sgd' else 'Adam'}"):
        DLRT(factors(), 0.1, rule=other).load_state_dict(saved["optimizer"])
    with pytest.raises(UsageError, match="of other factors"):
        DLRT(factors(), leave=("inner",), **options).load_state_dict(saved["optimizer"])


def test_weights_that_something_else_has_changed_are_taken_as_they_are() -> None:
    _, x, y = planted([3.0, 2.0, 1.0])
    net = small_net(3)
    optimizer = DLRT(net, lr=0.05, tau=0.0, momentum=0.9)
    optimizer.step(closure_of(net, x, y, halved))
    core = optimizer.cores[0]
    momentum = core.left @ core.state["momentum_buffer"] @ core.right.T
    with torch.no_grad():
        net[1].weight *= 0.5
        net[0].weight[0] *= -3
    changed = product(optimizer)
    optimizer._follow()
    now = optimizer.cores[0]
    assert torch.allclose(now.left @ now.middle @ now.right.T, changed, atol=1e-12)
    assert torch.allclose(now.left @ now.state["momentum_buffer"] @ now.right.T, momentum, atol=1e-12)
    assert float(optimizer.step(closure_of(net, x, y, halved))) == pytest.approx(float(halved(x @ changed.T, y)))


@pytest.mark.parametrize("fails", [1, 2])
def test_a_loss_that_is_no_number_leaves_the_net_as_it_was(fails: int) -> None:
    net, (x, y), calls = factors().eval(), images(1)[0], [0]
    optimizer = DLRT(net, 0.1)
    before, ranks = net(x).detach(), optimizer.ranks()

    def closure() -> Tensor:
        calls[0] += 1
        loss = F.cross_entropy(net(x), y) * (torch.nan if calls[0] == fails else 1)
        loss.backward()
        return loss

    with pytest.raises(Diverged, match="no number"):
        optimizer.step(closure)
    assert calls == [fails] and optimizer.ranks() == ranks and relative_error(net(x), before) < 1e-6
    for broken, message in ((None, "give step"), (lambda: None, "returned nothing")):
        with pytest.raises(UsageError, match=message):
            optimizer.step(broken)
    assert relative_error(net(x), before) < 1e-6


def test_a_captured_model_in_factors_is_trained_and_stays_sound() -> None:
    torch.manual_seed(0)
    data, net = images(40), Net().eval()
    model = go.capture(net, (data[0][0],), dynamic={0: {0: "batch"}})
    model, _ = go.run(model, "low-rank{rank=0.25,forms=linear;kxk-1x1}")
    start = sum(float(F.cross_entropy(model(x), y).detach()) for x, y in data[:5])
    optimizer = DLRT(model.train(), lr=0.3, tau=0.02)
    assert optimizer.ranks() == {"conv": 2, "inner": 2, "head": 1}
    train(model.module, optimizer, data * 3)
    verify(model.eval())
    assert sum(float(F.cross_entropy(model(x), y).detach()) for x, y in data[:5]) < 0.8 * start
    wide = model.params["conv.factors.0.weight"].shape[0]
    assert optimizer.ranks()["conv"] == wide != 2
    again, (report,) = go.run(model, "truncate-factors")
    assert not report.changed and again.params["conv.factors.1.weight"].shape[1] == wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.0}, "tau is 1"),
        ({"tau": -0.1}, "tau is -0.1"),
        ({"least": 0}, "least is 0"),
        ({"least": 3, "most": 2}, "least is 3 and most 2"),
        ({"rule": "sdg"}, "did you mean sgd"),
        ({"betas": (0.9, 0.99)}, "refuses its options"),
        ({"lr": -1.0}, "refuses its options"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        DLRT(factors(), **({"lr": 0.1} | options))
    assert message in str(caught.value)
