"""A branch whose result `forward` drops goes at capture; its tensors stay in the state dict as all unused ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.printer import operator_name
from graphopt.verify import verify

PAIR = {"pooler.weight", "pooler.bias"}


class Net(nn.Module):
    """An encoder, and a branch that looks at its first feature as BERT's pooler does at the first token."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("offset", torch.ones(4))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)
        self.step = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)

    def pooled(self, y: Tensor) -> Tensor:
        return torch.tanh(self.pooler(y[:, 0:1].expand(-1, 4)))


def untouched(net: Net, x: Tensor) -> Tensor:
    return net.encoder(x)


def dropped(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    net.pooled(y)
    return y


def used(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    return y + net.pooled(y)


def used_in_part(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    pooled = net.pooled(y)
    torch.sigmoid(pooled + net.offset)
    return y + pooled


def dropped_with_buffers(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    (net.pooled(y) * net.scale + net.offset + torch.tensor([3.0])).relu_()
    return y


def dropped_under_no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.pooled(x)
    return net.encoder(x)


def dropped_encoder_call(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    torch.tanh(net.encoder(y))
    return y


def dropped_write(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    z = y.view(-1)
    z.mul_(2)
    return y


def dropped_norm(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    net.norm(net.pooled(y))
    return y


def dropped_dropout(net: Net, x: Tensor) -> Tensor:
    y = net.encoder(x)
    torch.dropout(net.pooled(y), 0.5, net.training)
    return torch.dropout(y, 0.5, net.training)


def captured(net: nn.Module) -> go.Model:
    return go.capture(net, (torch.randn(3, 4),), dynamic={0: {0: "n"}})


def operators(model: go.Model) -> list[str]:
    return [operator_name(node.target) for node in model.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "forward", [dropped, dropped_with_buffers, dropped_under_no_grad], ids=lambda forward: forward.__name__
)
def test_a_dropped_branch_leaves_what_a_forward_without_it_leaves(forward: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(forward).eval()
    model = captured(net)
    net.step = untouched
    without = captured(net)
    assert operators(model) == operators(without) == ["linear"]
    assert model.kept == without.kept and model.kept >= PAIR
    assert list(model.state_dict()) == list(without.state_dict()) == list(net.state_dict())
    assert set(dict(model.params.items())) == set(dict(without.params.items()))
    x = torch.randn(5, 4)
    assert torch.equal(model(x), net(x))


def test_a_branch_that_is_used_stays() -> None:
    net = Net(used).eval()
    model, x = captured(net), torch.randn(5, 4)
    assert not PAIR & model.kept and "tanh" in operators(model)
    assert torch.equal(model(x), net(x))


def test_only_the_part_that_nothing_uses_goes() -> None:
    net = Net(used_in_part).eval()
    model, x = captured(net), torch.randn(5, 4)
    assert not PAIR & model.kept and "offset" in model.kept
    assert "tanh" in operators(model) and "sigmoid" not in operators(model)
    assert torch.equal(model(x), net(x))


def test_a_parameter_that_a_used_branch_reads_too_stays() -> None:
    net = Net(dropped_encoder_call).eval()
    model, x = captured(net), torch.randn(5, 4)
    assert operators(model) == ["linear"] and not {"encoder.weight", "encoder.bias"} & model.kept
    assert torch.equal(model(x), net(x))


def test_a_parameter_tied_to_one_of_a_used_branch_stays_tied() -> None:
    net = Net(dropped).eval()
    net.pooler.weight = net.encoder.weight
    model, x = captured(net), torch.randn(5, 4)
    assert model.params.ties() == [frozenset({"encoder.weight", "pooler.weight"})]
    assert "pooler.bias" in model.kept and "encoder.bias" not in model.kept
    assert len({"encoder.weight", "pooler.weight"} & model.kept) == 1
    assert list(model.state_dict()) == list(net.state_dict())
    model(x).sum().backward()
    net(x).sum().backward()
    torch.testing.assert_close(model.params["encoder.weight"].grad, net.encoder.weight.grad)


def test_a_write_whose_result_is_dropped_is_still_made() -> None:
    net = Net(dropped_write).eval()
    x = torch.randn(5, 4)
    assert torch.equal(captured(net)(x), net(x))


def test_a_dropped_branch_that_counts_statistics_stays_in_training_only() -> None:
    net, x = Net(dropped_norm).train(), torch.randn(5, 4)
    model = captured(net)
    assert not PAIR & model.kept
    for each in (net, model):
        each(x)
    torch.testing.assert_close(model.params["norm.running_mean"], net.norm.running_mean)
    assert operators(captured(net.eval())) == ["linear"]


def test_a_dropped_branch_that_draws_random_numbers_stays_in_training_only() -> None:
    """What is drawn after it would change."""
    net, x = Net(dropped_dropout).train(), torch.randn(50, 4)
    model = captured(net)
    results = []
    for each in (net, model):
        torch.manual_seed(0)
        results.append(each(x))
    assert torch.equal(*results) and operators(model).count("dropout") == 2
    assert "tanh" not in operators(captured(net.eval()))


@pytest.mark.parametrize("suffix", ["gopt", "pt2"])
def test_a_file_keeps_the_tensors_of_a_dropped_branch(suffix: str, tmp_path: Path) -> None:
    net = Net(dropped).eval()
    model, x = captured(net), torch.randn(5, 4)
    model.save(tmp_path / f"net.{suffix}")
    loaded = go.load(tmp_path / f"net.{suffix}")
    verify(loaded)
    assert loaded.kept == model.kept and torch.equal(loaded(x), net(x))
    assert torch.equal(loaded.state_dict()["pooler.weight"], net.pooler.weight)
