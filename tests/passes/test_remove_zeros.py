"""Units that are zero go where nobody reads anything of them, and stay, with the reason, where somebody does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.coupling import couple
from graphopt.train.dhspg import DHSPG
from graphopt.train.hesso import HESSO
from graphopt.train.sparse import SparseOptimizer
from graphopt.train.units import Units
from tests.compare import relative_error
from tests.coupling import nets
from tests.passes.apply import Net, apply, gradients, reasons


class Trained(nn.Module):
    """Convolutions, batch norms and ReLU with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.n1, self.b, self.n2 = (
            nn.Conv2d(8, 12, 3),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 8, 1),
            nn.BatchNorm2d(8),
        )
        self.n2, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n0(self.stem(x)))
        x = torch.relu(x[:, :, 1:-1, 1:-1] + self.n2(self.b(torch.relu(self.n1(self.a(x))))))
        return self.head(x.mean((2, 3)))


def colours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, and which of their channels is the brightest (3: none)."""
    x = torch.randn(count, 3, 6, 6, generator=generator) * 0.5 + torch.randn(count, 3, 1, 1, generator=generator)
    means = x.mean((2, 3))
    return x, torch.where(means.max(1).values > 0.3, means.argmax(1), 3)


@pytest.mark.parametrize("kind", [HESSO, DHSPG])
def test_a_trained_net_is_smaller_and_the_same(kind: type[SparseOptimizer]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = colours(256, generator)
    model = go.capture(Trained(), (x[:2],), dynamic={0: {0: "batch"}}).train()
    optimizer = kind(model, 0.02, 0.4, steps=60, start_step=20, rule="adamw")
    for _ in range(180):
        batch, wanted = colours(16, generator)
        optimizer.zero_grad()
        F.cross_entropy(model.module(batch), wanted).backward()
        optimizer.step()
    model.eval()
    small, (report,) = go.run(model, "remove-zeros", check=True)
    assert {name: count for name, count in report.findings["removed"].items() if count} == {
        name: len(units) for name, units in optimizer.zeros().items() if units
    }
    widths = {name: tensor.shape[0] for name, tensor in small.params.items() if name in ("stem.weight", "a.weight")}
    assert sum(widths.values()) == 12  # 8 of 20 are gone
    with torch.no_grad():
        before, after = model(x), small(x)
    assert relative_error(after, before) <= 1e-5
    right = [(out.argmax(1) == y).float().mean() for out in (before, after)]
    assert right[0] == right[1] > 0.8
    assert torch.isclose(F.cross_entropy(before, y), F.cross_entropy(after, y), rtol=1e-5)
    assert report.cost_after.macs < 0.6 * report.cost_before.macs
    assert go.run(small, "remove-zeros")[1][0].edits == ()
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients(small, (x[:3],)).values())


Zeroed = tuple[nn.Module, tuple[Tensor, ...], dict[str, int]]


def zeroed(name: str, part: float = 0.5, family: int = 0) -> Zeroed:
    """A net in which the first part of the units of every group is zero, and how many of each those are."""
    net, args, _ = nets.build(name)
    model = go.capture(net, args)
    coupling = couple(model)
    families = {group.name: min(family, len(group.families) - 1) for group in coupling.groups.values()}
    units = Units(coupling, coupling.groups.values(), families=families)
    chosen = torch.zeros(units.count, dtype=torch.bool)
    for span in units.spans:
        chosen[span.start : span.start + round(part * span.size)] = True
    units.zero(chosen)
    net.load_state_dict(model.module.state_dict())
    return net, args, {span.name: round(part * span.size) for span in units.spans}


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("residual", {"stem": 4, "a": 6}),
        ("c2f", {"stem": 5, "cv1": 5, "m.0.0": 3, "m.1.0": 3, "cv2": 4}),  # cv1: all of one half but one
        ("experts", None),
        ("tied", None),
        ("unet", None),
    ],
)
def test_zero_that_stays_zero_goes(name: str, removed: dict[str, int] | None) -> None:
    net, args, counts = zeroed(name)
    _, small, report = apply(net, args, "remove-zeros")
    assert report.findings["removed"] == (removed or counts) and reasons(report) == []
    with torch.no_grad():
        assert relative_error(small(*args), net(*args)) <= 1e-5


@pytest.mark.parametrize("family", [0, 1])
def test_heads_and_features(family: int) -> None:
    """A head without queries, keys and values answers zero; without some features it attends as before."""
    net, args, counts = zeroed("attention", family=family)
    _, small, report = apply(net, args, "remove-zeros")
    # The first six features are those of queries and keys, of which one stays; the others are those of values.
    assert report.findings["removed"] == {"query": counts["query"] - family, "up": counts["up"]}
    assert small.params["query.weight"].shape == ((4, 24) if family else (12, 24))
    assert "'stem' stay" in reasons(report)[0]  # its zeros count in the statistics of layer norms
    with torch.no_grad():
        assert relative_error(small(*args), net(*args)) <= 1e-5


def net_with(activation: nn.Module, reader: float = 1.0) -> nn.Module:
    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    with torch.no_grad():
        first.weight[2:5] = 0
        first.bias[2:5] = 0
        last.weight[:, 2:5] *= reader
    return Net(lambda self, x: self.last(self.act(self.first(x))), first=first, last=last, act=activation)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU()])
def test_activations_that_keep_zero(activation: nn.Module) -> None:
    _, small, report = apply(net_with(activation), (torch.randn(2, 6),), "remove-zeros")
    assert small.params["first.weight"].shape == (5, 6) and report.findings["removed"] == {"first": 3}


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()])
def test_activations_that_do_not(activation: nn.Module) -> None:
    net, x = net_with(activation), torch.randn(2, 6)
    before, small, report = apply(net, (x,), "remove-zeros")
    assert not report.changed and torch.equal(small(x), before(x)) and report.findings["removed"] == {}
    (reason,) = reasons(report)
    assert reason.startswith("the 3 zero units of group 'first' stay: what reads them does not see zero")


def test_near_miss_nobody_reads_what_is_not_zero() -> None:
    _, small, report = apply(net_with(nn.Sigmoid(), reader=0.0), (torch.randn(2, 6),), "remove-zeros")
    assert small.params["first.weight"].shape == (5, 6) and reasons(report) == []


def test_near_miss_a_bias_that_is_not_zero() -> None:
    net = net_with(nn.ReLU())
    with torch.no_grad():
        net.first.bias[3] = 1e-3
    _, small, report = apply(net, (torch.randn(2, 6),), "remove-zeros")
    assert report.findings["removed"] == {"first": 2} and small.params["first.weight"].shape == (6, 6)


def test_statistics_that_are_not_those_of_zero() -> None:
    """A batch norm without scale and shift makes -mean / deviation of zero."""
    norm = nn.BatchNorm2d(8, affine=False)
    norm.running_mean.fill_(0.3)
    first, last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
    with torch.no_grad():
        first.weight[:4] = 0
        first.bias[:4] = 0
    net = Net(lambda self, x: self.last(torch.relu(self.norm(self.first(x)) + 1)), first=first, norm=norm, last=last)
    _, _, report = apply(net, (torch.randn(2, 3, 4, 4),), "remove-zeros")
    assert not report.changed and len(reasons(report)) == 1


def test_a_group_that_is_zero_as_a_whole_keeps_one_unit() -> None:
    net, args, _ = zeroed("residual", 1.0)
    _, small, report = apply(net, args, "remove-zeros")
    assert report.findings["removed"] == {"stem": 7, "a": 11}
    assert small.params["b.weight"].shape == (1, 1, 3, 3)
    with torch.no_grad():
        assert relative_error(small(*args), net(*args)) <= 1e-5
    assert go.run(small, "remove-zeros")[1][0].edits == ()


def test_good_groups_go_beside_bad_ones() -> None:
    layers = [nn.Linear(6, 6) for _ in range(6)]
    acts = [torch.relu, torch.sigmoid, torch.tanh, F.softplus, F.gelu]
    with torch.no_grad():
        for layer in layers[:-1]:
            layer.weight[:2] = 0
            layer.bias[:2] = 0

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, acts, strict=False):
            x = act(layer(x))
        return self.layers[-1](x)

    _, small, report = apply(Net(forward, layers=nn.ModuleList(layers)), (torch.randn(2, 6),), "remove-zeros")
    assert report.findings["removed"] == {"layers.0": 2, "layers.2": 2, "layers.4": 2}
    first, second = reasons(report)
    assert "'layers.1'" in first and "'layers.3'" in second
    assert small.params["layers.1.weight"].shape == (6, 4)


def test_nothing_is_zero() -> None:
    net, args, _ = nets.build("residual")
    _, _, report = apply(net, args, "remove-zeros")
    assert not report.changed and reasons(report) == [] and report.findings["removed"] == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = net_with(nn.ReLU()).to(dtype)
    _, small, _ = apply(net, (torch.randn(2, 6, dtype=dtype),), "remove-zeros")
    assert small.params["first.weight"].shape == (5, 6)


def test_in_training_mode() -> None:
    net, args, counts = zeroed("residual")
    small, (report,) = go.run(go.capture(net.train(), args), "remove-zeros")
    assert report.findings["removed"] == counts
    with torch.no_grad():
        assert relative_error(small(*args), net(*args)) <= 1e-5


def test_weights_that_are_not_known_are_not_zero() -> None:
    with torch.device("meta"):
        net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(1, 4)
    _, (report,) = go.run(go.capture(net, (x,)), "remove-zeros", check=False)
    assert not report.changed
