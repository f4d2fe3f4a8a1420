"""DLRT: the step against that on the full matrix, bases, ranks, and moments in other bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.check import relative_error
from graphopt.train import DLRT, as_factors


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


def test_weights_of_zero_grow() -> None:
    """Where S is singular, G V and G^T U still say in which directions to go; G L and G^T K would not."""
    matrix, x, y = planted([3.0, 2.0, 1.0])
    layer = nn.Linear(14, 10, bias=False).double()
    nn.init.zeros_(layer.weight)
    net, _ = as_factors(layer, 2)
    optimizer = DLRT(net, lr=0.2, tau=0.0)
    core, gradient = optimizer.cores[0], -y.T @ x / len(x)
    optimizer.step(closure_of(net, x, y, halved))
    for found, wanted in (
        (optimizer.cores[0].left, gradient @ core.right),
        (optimizer.cores[0].right, gradient.T @ core.left),
    ):
        assert torch.allclose(found @ found.T @ wanted, wanted, atol=1e-10)
    optimizer.tau = 0.02
    for _ in range(150):
        optimizer.step(closure_of(net, x, y, halved))
    assert optimizer.ranks() == {"": 3} and float((product(optimizer) - matrix).norm()) < 1e-6


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
