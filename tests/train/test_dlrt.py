"""DLRT: the step against that on the full matrix, bases, ranks, moments in other bases, and going on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.check import relative_error
from graphopt.errors import UsageError
from graphopt.train import DLRT, Diverged, as_factors
from graphopt.train.checkpoint import load_checkpoint, save_checkpoint
from graphopt.verify import verify


def closure_of(net: nn.Module, x: Tensor, y: Tensor, loss: Any = F.mse_loss) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        value: Tensor = loss(net(x), y)
        value.backward()
        return value

    return closure


def product(optimizer: DLRT, index: int = 0) -> Tensor:
    outer, inner = optimizer.pairs[index].matrices()
    return (outer @ inner).detach()


@settings(deadline=None, max_examples=15)
@given(
    out=st.integers(2, 7), inputs=st.integers(2, 7), conv=st.booleans(), window=st.sampled_from(["first", "second"]),
    rule=st.sampled_from(["sgd", "momentum", "nesterov", "decay"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_at_full_rank_steps_are_those_on_the_matrix_itself(
    out: int, inputs: int, conv: bool, window: Any, rule: str, seed: int
) -> None:
    """With tau = 0 nothing is cut, U1 or V1 spans everything, and five steps of SGD are five steps of SGD. Momentum
    of other directions than the smaller side has is dropped, so that with it the matrix has to be square."""
    torch.manual_seed(seed)
    if rule in ("momentum", "nesterov"):
        inputs, conv = out, False
    layer = (nn.Conv2d(inputs, out, 3, padding=1) if conv else nn.Linear(inputs, out)).double()
    x = torch.randn(4, inputs, 5, 5).double() if conv else torch.randn(8, inputs).double()
    y = torch.randn_like(layer(x)).detach()
    options: dict[str, Any] = {"lr": 0.3}
    if rule != "sgd":
        options |= {"weight_decay": 0.1} if rule == "decay" else {"momentum": 0.9, "nesterov": rule == "nesterov"}
    net, _ = as_factors(layer, window=window)
    optimizer, plain = DLRT(net, tau=0.0, **options), torch.optim.SGD(layer.parameters(), **options)
    ours, theirs = closure_of(net, x, y), closure_of(layer, x, y)
    for _ in range(5):
        loss = optimizer.step(ours)
        plain.zero_grad()
        assert torch.allclose(theirs().detach(), loss, rtol=1e-10)
        plain.step()
        assert torch.allclose(net.weight, layer.weight, rtol=0, atol=1e-11)
        assert torch.allclose(net.bias, layer.bias, atol=1e-12)


def planted(singular: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix [10, 14] with these singular values, data, and what it makes of them."""
    torch.manual_seed(seed)
    left, right = torch.linalg.qr(torch.randn(10, 10)).Q, torch.linalg.qr(torch.randn(14, 10)).Q
    values = torch.tensor(singular + [0.0] * (10 - len(singular)))
    matrix = ((left * values) @ right.T).double()
    x = torch.randn(300, 14).double()
    return matrix, x, x @ matrix.T


def small_net(rank: int) -> nn.Module:
    return as_factors(nn.Linear(14, 10, bias=False).double(), rank)[0]


def halved(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).square().sum(1).mean() / 2


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_planted_rank_is_found_from_below_and_from_above(rank: int) -> None:
    matrix, x, y = planted([3.0, 2.0, 1.0])
    net = small_net(rank)
    optimizer = DLRT(net, lr=0.2, tau=0.02)
    ranks = []
    for _ in range(150):
        optimizer.step(closure_of(net, x, y, halved))
        ranks.append(optimizer.ranks()[""])
    assert ranks[-20:] == [3] * 20 and max(ranks) <= max(6, 2 * rank)
    assert float((product(optimizer) - matrix).norm()) < 1e-6 * float(matrix.norm())
    model = go.capture(net.eval(), (x[:2],), dynamic={0: {0: "batch"}})
    assert [list(p.shape) for p in model.parameters()] == [[3, 14], [10, 3]]
    assert relative_error(model(x), y) < 1e-6


def test_bounds_of_ranks() -> None:
    _, x, y = planted([3.0, 2.0, 1.0])
    for options, wanted in (({"most": 2}, 2), ({"least": 5}, 5), ({"tau": 0.999}, 1), ({"tau": 0.0}, 10)):
        net = small_net(4)
        optimizer = DLRT(net, lr=0.2, **({"tau": 0.02} | options))
        for _ in range(40):
            optimizer.step(closure_of(net, x, y, halved))
        assert optimizer.ranks() == {"": wanted} and net[0].out_features == net[1].in_features == wanted


def test_a_bounded_rank_ends_at_the_best_matrix_of_that_rank() -> None:
    """On white data that is the truncated SVD."""
    matrix, _, _ = planted([3.0, 2.0, 1.0, 0.5])
    x = torch.eye(14).double() * 14**0.5
    net = small_net(2)
    optimizer = DLRT(net, lr=0.3, tau=0.0, most=2)
    for _ in range(200):
        optimizer.step(closure_of(net, x, x @ matrix.T, halved))
    left, values, right = torch.linalg.svd(matrix)
    assert torch.allclose(product(optimizer), left[:, :2] * values[:2] @ right[:2], atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    rank=st.integers(1, 6), tau=st.sampled_from([0.0, 0.05, 0.3, 0.6]), lr=st.floats(1e-6, 0.5), seed=st.integers(0, 99)
)
def test_a_step_is_the_projected_one_and_truncation_costs_what_it_may(
    rank: int, tau: float, lr: float, seed: int
) -> None:
    """W - h U1 U1^T G V1 V1^T with U1, V1 the spans of [U | G V], [V | G^T U], within tau of its norm; and those of
    [U | K'] and [V | L'], as the paper has them, are the same."""
    torch.manual_seed(seed)
    net = small_net(rank)
    _, x, y = planted([3.0, 2.0, 1.0, 0.3, 0.1], seed)
    optimizer = DLRT(net, lr=lr, tau=tau)
    core, before = optimizer.cores[0], product(optimizer)
    gradient = (before @ x.T - y.T) @ x / len(x)

    def projector(basis: Tensor, more: Tensor) -> Tensor:
        spanned = torch.linalg.qr(torch.cat([basis, more], 1)).Q
        return spanned @ spanned.T

    left, right = core.left, core.right
    rows, columns = projector(left, gradient @ right), projector(right, gradient.T @ left)
    big = max(lr, 0.1)  # the span does not depend on it, only its digits do
    k_step = left @ core.middle - big * gradient @ right
    assert torch.allclose(rows, projector(left, k_step), atol=1e-8)
    wanted = before - lr * rows @ gradient @ columns
    optimizer.step(closure_of(net, x, y, halved))
    now = optimizer.cores[0]
    error = float((product(optimizer) - wanted).norm())
    assert error <= (tau + 1e-10) * float(wanted.norm())
    values = torch.linalg.svdvals(wanted)
    fewer = values[now.middle.shape[0] - 1 :].norm() if len(now.middle) > 1 else torch.tensor(1e9)
    assert float(fewer) > tau * float(values.norm())  # one less would be too few
    for basis in (now.left, now.right):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-12)
    assert torch.equal(now.middle, torch.diag(now.middle.diag()))


def test_momentum_follows_the_bases() -> None:
    """It is the same matrix after a step whose rank changes, but for what is cut off."""
    _, x, y = planted([3.0, 2.0, 1.0])
    for tau in (0.0, 0.1):
        net = small_net(2)
        optimizer = DLRT(net, lr=0.05, tau=tau, momentum=0.9)
        optimizer.step(closure_of(net, x, y, halved))
        core = optimizer.cores[0]
        old = core.left @ core.state["momentum_buffer"] @ core.right.T
        gradient = (product(optimizer) @ x.T - y.T) @ x / len(x)
        optimizer.step(closure_of(net, x, y, halved))
        new = optimizer.cores[0]
        assert tau or new.middle.shape[0] > core.middle.shape[0]
        spans = [torch.linalg.qr(torch.cat(p, 1)).Q for p in (
            [core.left, gradient @ core.right], [core.right, gradient.T @ core.left],
        )]  # fmt: skip
        step = 0.9 * old + spans[0] @ spans[0].T @ gradient @ spans[1] @ spans[1].T
        kept = new.left @ new.left.T @ step @ new.right @ new.right.T
        found = new.left @ new.state["momentum_buffer"] @ new.right.T
        assert torch.allclose(found, kept, atol=1e-12)
        assert (tau == 0) == torch.allclose(kept, step, atol=1e-12)


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_second_moments_are_one_number_and_first_ones_a_matrix(rule: str) -> None:
    matrix, x, y = planted([3.0, 2.0, 1.0])
    net = small_net(5)
    optimizer = DLRT(net, lr=0.2, tau=0.05, rule=rule, amsgrad=True, weight_decay=0.0)
    schedule, ranks = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985), set()
    for count in range(1, 301):
        optimizer.step(closure_of(net, x, y, halved))
        schedule.step()
        state, r = optimizer.cores[0].state, optimizer.ranks()[""]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (r, r) and int(state["step"]) == count
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(state[name], state[name][0, 0].expand(r, r)) and float(state[name][0, 0]) > 0
        ranks.add(r)
    assert r == 3 and len(ranks) > 1
    assert float((product(optimizer) - matrix).norm()) < 1e-2 * float(matrix.norm())


def test_small_steps_lose_no_digits() -> None:
    """In float32, where K - h G V is K but for a few of its last bits."""
    _, x, y = planted([3.0, 2.0, 1.0])
    net = small_net(2).float()
    optimizer = DLRT(net, lr=1e-7, tau=0.0)
    core, before = optimizer.cores[0], product(optimizer).double()
    gradient = (before @ x.T - y.T) @ x / len(x)
    _, (enlarged,) = optimizer._enlarged(closure_of(net, x.float(), y.float(), halved))
    sides = ((enlarged.left, gradient @ core.right.double()), (enlarged.right, gradient.T @ core.left.double()))
    for basis, wanted in sides:
        rest = wanted - basis.double() @ (basis.double().T @ wanted)
        assert basis.shape[1] == 4 and float(rest.norm()) < 1e-5 * float(wanted.norm())


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
