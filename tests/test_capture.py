"""Capture: what comes in is what was there, functional, named, trainable; the user's module stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import UnsupportedError
from graphopt.ops import is_in_place
from graphopt.verify import verify
from tests.compare import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("offset", torch.ones(8), persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, object]:
        x = torch.relu_(self.bn(self.conv(batch["x"])))
        x = x + 1
        y = self.second(self.first(x.mean((2, 3)))) + torch.tensor([1.0]) + self.offset
        y[:, :4].mul_(2)
        return {"scores": y, "features": [x]}


def net_and_model(mode: str = "eval") -> tuple[Net, go.Model]:
    net = getattr(Net(), mode)()
    return net, go.capture(net, ({"x": torch.randn(2, 3, 8, 8)},), dynamic={"batch": {"x": {0: "n"}}})


def test_same_outputs_at_other_sizes() -> None:
    net, model = net_and_model()
    for size in (1, 2, 5):
        batch = {"x": torch.randn(size, 3, 8, 8)}
        assert relative_error(model(batch), net(batch)) == 0


def test_state_dict_names_and_ties_are_the_modules() -> None:
    net, model = net_and_model()
    assert list(model.state_dict()) == list(net.state_dict())
    assert model.params.ties() == [frozenset({"first.weight", "second.weight"})]
    assert {"unused.weight", "unused.bias", "bn.num_batches_tracked"} <= model.kept


def test_trains_like_the_module() -> None:
    net, model = net_and_model()
    batch = {"x": torch.randn(3, 3, 8, 8)}
    for each in (net, model):
        each(batch)["scores"].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(parameter.grad, gradients[name])
    assert model.params["conv.weight"].grad is not None


def test_user_module_is_left_alone() -> None:
    net = Net().train()
    net.first.register_forward_hook(lambda *_: None)
    state, hooks = copy.deepcopy(net.state_dict()), len(net.first._forward_hooks)
    model = go.capture(net, ({"x": torch.randn(2, 3, 8, 8)},))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert net.training and net.bn.training and len(net.first._forward_hooks) == hooks
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_modes_switch_by_arguments() -> None:
    net, model = net_and_model("train")
    assert model.mode == "train"
    verify(model.eval())
    net.eval()
    batch = {"x": torch.randn(4, 3, 8, 8)}
    assert relative_error(model(batch), net(batch)) == 0
    verify(model.train())
    before = model.params["bn.running_mean"].clone()
    model(batch)
    assert not torch.equal(before, model.params["bn.running_mean"])


def test_frozen_batch_norm_stays_frozen() -> None:
    net = Net().train()
    net.bn.eval()
    model = go.capture(net, ({"x": torch.randn(2, 3, 8, 8)},))
    verify(model)
    before = model.params["bn.running_mean"].clone()
    model.eval().train()({"x": torch.randn(2, 3, 8, 8)})
    assert torch.equal(before, model.params["bn.running_mean"])


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        z = y.view(-1)
        z[0] = 5
        w = y.t()
        w[1] += 3
        a, b = y.split(2, 1)
        a.mul_(10)
        z.add_(1)
        y[:, 1:] = torch.flip(y[:, 1:], [1])
        q = y.clone()
        q[y > 20] = 0
        q.clamp_(max=7).neg_()
        c, d = q.unbind(0)[:2]
        d.copy_(c)
        q.permute(1, 0)[2].fill_(4)
        return y, z, w, a, b, q, d


class Aliased(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = x + 1
        first = y.add_(1)
        kept = torch.nn.functional.dropout(y, 0.5, training=False)
        y.mul_(3)
        return first, kept, y


class Copied(nn.Module):
    """Values that look like views and are copies: what is written to them stays there."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        copies = (y.t().reshape(-1), y.to(torch.float64), torch.nn.functional.linear(y, y[:, :4]), y.matmul(y.t()))
        for each in copies:
            each.add_(1)
        y.contiguous().mul_(2)
        return y, *copies


class Selected(nn.Module):
    """Writes beside, to and through tensors whose size is known only once the numbers are."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        y[0].add_(1)
        places = (x > 0).nonzero().flatten().reshape(-1, 2)
        rows, columns = torch.where(x > 0)
        count = (x > 0).sum().item()
        chosen = x[rows, columns]
        row = chosen.view(-1)
        row.mul_(3)
        chosen.relu_()
        return y, y + places.sum(), y * chosen.sum(), y * count


NETS = {"views": Writes(), "results of writes": Aliased(), "copies": Copied(), "sizes from data": Selected()}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_writes_become_functional(net: nn.Module) -> None:
    x = torch.randn(3, 4)
    model = go.capture(net, (x,))
    assert not [node for node in model.graph.nodes if is_in_place(node)]
    for ours, theirs in zip(model(x), net(x), strict=True):
        assert torch.equal(ours, theirs)


class WritesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class NeedsEight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(8, -1)


class Autocast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.T


@pytest.mark.parametrize(
    ("net", "dynamic", "words"),
    [
        (WritesInput(), None, ["changes its input 'x' in place", "x.add_(1)"]),
        (Counts(), None, ["changes its tensor 'calls' in place"]),
        (Branches(), None, ["values of a tensor", "if x.sum() > 0:", "test_capture.py"]),
        (NeedsEight(), {"x": {0: "n"}}, ["`dynamic` leaves free"]),
        (Autocast(), None, ["torch.autocast"]),
    ],
    ids=["writes its input", "writes a buffer", "data-dependent branch", "fixed size", "autocast"],
)
def test_refused_with_the_users_line(net: nn.Module, dynamic: dict | None, words: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        go.capture(net, (torch.randn(8, 8),), dynamic=dynamic)
    assert all(word in str(caught.value) for word in words), str(caught.value)


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.weight * 2
        return x * scale + self.weight


def test_no_grad_regions_stop_gradients() -> None:
    net, x = NoGrad(), torch.randn(3, 4)
    model = go.capture(net, (x,))
    assert relative_error(model(x), net(x)) == 0
    for each in (net, model):
        each(x).sum().backward()
    torch.testing.assert_close(model.params["weight"].grad, net.weight.grad)


def test_random_initialisation_in_place_becomes_functional() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = torch.empty_like(x).bernoulli_(0.5)
            return x * keep

    model = go.capture(Noise().train(), (torch.ones(8, 8),))
    kept = model(torch.ones(8, 8))
    assert set(kept.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("free", [False, True])
def test_one_of_several_results_may_be_written_to(free: bool) -> None:
    """Results of topk are tensors of their own; those of split are views, and what is written to them shows in all."""

    class Router(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            weights, chosen = torch.topk(torch.softmax(x, -1), 2, dim=-1)
            weights /= weights.sum(-1, keepdim=True)
            chosen.add_(1)
            whole = x * 2
            first, second = whole.split(3, 1)
            first.mul_(second)
            return weights, chosen, whole

    dynamic: dict[str | int, Any] | None = {0: {0: "batch"}} if free else None
    model = go.capture(Router().eval(), (torch.randn(4, 6),), dynamic=dynamic)
    x = torch.randn(7 if free else 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(model(x), Router()(x), strict=True))
