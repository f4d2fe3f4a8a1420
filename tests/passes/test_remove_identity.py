from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt as go
from graphopt.export import to_exported_program
from graphopt.registry import get_pass
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons

PASS = "remove-identity"
X = torch.randn(2, 4, 6, 6)
BATCH = {"x": {0: "batch"}}

# The call, in front of which and behind which something is computed, for x [2, 4, 6, 6].
IDENTITIES = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout that drops nothing": lambda x: F.dropout(x, 0.0, training=True),
    "reshape": lambda x: x.reshape(2, 4, 6, 6),
    "view with -1": lambda x: x.view(2, -1, 6, 6),
    "flatten of one axis": lambda x: x.flatten(1, 1),
    "squeeze of nothing": lambda x: x.squeeze(1),
    "permute in order": lambda x: x.permute(0, 1, -2, 3),
    "transpose of an axis with itself": lambda x: x.transpose(3, -1),
    "movedim to where it is": lambda x: x.movedim(1, 1),
    "expand": lambda x: x.expand(-1, 4, 6, 6),
    "slice of everything": lambda x: x[:, 0:, :6],
    "repeat once": lambda x: x.repeat(1, 1, 1, 1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "cast to its own dtype": lambda x: x.to(torch.float32),
    "type_as": lambda x: x.type_as(x),
    "pad by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "reflect by nothing": lambda x: F.pad(x, (0, 0, 0, 0), mode="reflect"),
    "cat of one": lambda x: torch.cat([x], 1),
    "split into one piece": lambda x: x.split(4, 1)[0],
    "chunk into one piece": lambda x: x.chunk(1, 1)[0],
    "add 0 to what is no float": lambda x: x * (torch.ones(6).long() + 0),
    "subtract 0.0": lambda x: x - 0.0,
    "add -0.0": lambda x: x + -0.0,
    "add 0.0 where no operator sees its sign": lambda x: x + 0.0,
    "add 0 from the left": lambda x: 0 + x,
    "multiply by 1": lambda x: x * 1,
    "multiply from the left": lambda x: 1.0 * x,
    "divide by 1": lambda x: x / 1.0,
    "power 1": lambda x: x**1,
    "relu after relu": lambda x: x.relu().relu(),
    "relu after sigmoid, through movement": lambda x: x.sigmoid().transpose(1, 2).relu(),
    "relu after a cat of relus": lambda x: torch.cat([x.relu(), x.sigmoid()], 1).relu(),
    "relu6 after relu6": lambda x: F.relu6(F.relu6(x)),
    "wide clamp": lambda x: x.tanh().clamp(-2, 2),
    "max pool of one element": lambda x: F.max_pool2d(x, 1),
    "average pool of one element": lambda x: F.avg_pool2d(x, 1, 1),
    "adaptive pool to the same size": lambda x: F.adaptive_avg_pool2d(x, 6),
    "nearest to the same size": lambda x: F.interpolate(x, size=(6, 6)),
    "nearest by 1": lambda x: F.interpolate(x, scale_factor=1.0),
    "flip of an axis of one": lambda x: x[:, :1].flip(1),
    "roll by a whole turn": lambda x: x.roll(6, 2),
    "twice negated": lambda x: x.neg().neg(),
    "floor of floor": lambda x: x.floor().floor(),
    "pixel shuffle by 1": lambda x: F.pixel_shuffle(x, 1),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_goes(name: str) -> None:
    identity = IDENTITIES[name]
    net = Net(lambda _, x: identity(x.sin()).cos())
    before, after, report = apply(net, (X,), PASS)
    assert len(operators(after)) < len(operators(before))
    assert len(report.edits) >= 1 and all("returns its input" in edit.why for edit in report.edits)
    with torch.no_grad():
        assert torch.equal(after(X), net(X))
    assert go.run(after, PASS)[1][0].edits == ()


NEAR_MISSES = {
    "dropout in training": lambda x: F.dropout(x, 0.5, training=True),
    "reshape to another shape": lambda x: x.reshape(2, 24, 6),
    "transpose of equal axes": lambda x: x.transpose(2, 3),
    "slice with a step": lambda x: x[:, ::2],
    "repeat of an axis": lambda x: x.repeat(2, 1, 1, 1),
    "cast to another dtype": lambda x: x.double(),
    "pad and crop": lambda x: F.pad(x, (1, -1)),
    "cat of two": lambda x: torch.cat([x, x], 1),
    "first of two pieces": lambda x: x.split(2, 1)[0],
    "multiply by True, an integer becomes a float": lambda x: (x > 0) * 1,
    "multiply by a row of ones that makes it larger": lambda x: x[:, :1] * torch.ones(4, 1, 1),
    "divide an integer by 1": lambda x: torch.arange(6) / 1,
    "multiply by 1 + eps": lambda x: x * 1.0000001,
    "power of 1.5": lambda x: x.abs() ** 1.5,
    "floor division by 1": lambda x: torch.div(x, 1.0, rounding_mode="floor"),
    "relu after a clamp that goes lower": lambda x: x.clamp(-1, 1).relu(),
    "relu6 after relu": lambda x: F.relu6(x.relu()),
    "relu after a pad with -1": lambda x: F.pad(x.relu(), (1, 1), value=-1.0).relu(),
    "relu after a difference": lambda x: (x.relu() - x.sigmoid()).relu(),
    "average pool that divides by 2": lambda x: F.avg_pool2d(x, 1, 1, divisor_override=2),
    "pool that skips": lambda x: F.max_pool2d(x, 1, 2),
    "nearest by 1.1 to the same size": lambda x: F.interpolate(x[:, :, :5, :5], scale_factor=1.1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(2, 2),
    "abs once": lambda x: x.abs(),
    "tril": lambda x: x.tril(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_looks_like_an_identity_stays(name: str) -> None:
    function = NEAR_MISSES[name]
    net = Net(lambda _, x: function(x.sin()).cos())
    before, after, report = apply(net, (X,), PASS)
    assert report.edits == () and operators(after) == operators(before)


def test_zero_is_kept_where_an_operator_tells_its_signs_apart() -> None:
    net = Net(lambda _, x: 1 / (x + 0.0))
    _, after, report = apply(net, (torch.tensor([-0.0, 1.0]),), PASS)
    assert reasons(report) == ["it turns -0.0 into 0.0, and 'reciprocal' may tell them apart"]
    assert after(torch.tensor([-0.0, 1.0]))[0] == math.inf


def test_uniform_constants_count_as_numbers_and_parameters_do_not() -> None:
    ones = Net(lambda net, x: x * net.scale, scale=torch.ones(4, 1, 1))
    _, after, report = apply(ones, (X,), PASS)
    assert len(report.edits) == 1 and "scale" not in after.params
    trained = Net(lambda net, x: x * net.scale, scale=nn.Parameter(torch.ones(4, 1, 1)))
    assert apply(trained, (X,), PASS)[2].edits == ()
    almost = Net(lambda net, x: x * net.scale, scale=torch.tensor([1.0, 1.0, 1.0, 2.0]).reshape(4, 1, 1))
    assert apply(almost, (X,), PASS)[2].edits == ()


def test_detach_stays_where_it_stops_a_gradient() -> None:
    net = Net(lambda net, x: net.layer(x).detach() + net.layer(x), layer=nn.Linear(6, 6))
    before, after, report = apply(net, (X,), PASS)
    assert report.edits == () and reasons(report) == ["it stops the gradient to 'linear'"]
    ours, theirs = gradients(after, (X,)), gradients(before, (X,))
    assert all(relative_error(ours[name], theirs[name]) == 0 for name in theirs)
    harmless = Net(lambda net, x: x * torch.arange(6).float().detach())
    assert operators(apply(harmless, (X,), PASS)[1])[-2:] != ["detach", "mul.Tensor"]


def test_views_behind_a_copy_become_reshapes_however_far() -> None:
    net = Net(lambda _, x: x.transpose(1, 2).contiguous().relu().mul(2).view(2, 24, 6))
    _, after, report = apply(net, (X,), PASS, dynamic=None)
    assert operators(after) == ["transpose.int", "relu", "mul.Tensor", "reshape"]
    assert report.edits[-1].why == "its input is no longer stored in order"
    assert errors_at(net, after, (X,)) == 0


def test_view_that_needs_no_copy_stays() -> None:
    net = Net(lambda _, x: x.sin().contiguous().view(2, 24, 6))
    assert operators(apply(net, (X,), PASS)[1]) == ["sin", "view"]


def test_free_sizes_are_equal_as_expressions() -> None:
    same = Net(lambda _, x: x.reshape(x.shape[0], 4, 6, 6).sin().expand(x.shape[0], -1, -1, -1))
    _, after, report = apply(same, (X,), PASS, dynamic=BATCH)
    assert len(report.edits) == 2 and operators(after) == ["sin"]
    assert errors_at(same, after, (X,), (torch.randn(5, 4, 6, 6),)) == 0
    other = Net(lambda _, x: x.sin().reshape(-1, 24, 6))
    assert apply(other, (X,), PASS, dynamic=BATCH)[2].edits == ()


def test_squeezing_a_free_axis_stays() -> None:
    """At batch 1 it drops the axis; at every other size it does nothing."""
    net = Net(lambda _, x: x.sin().squeeze(0))
    assert apply(net, (X,), PASS, dynamic=BATCH)[2].edits == ()


def test_model_that_returns_its_input() -> None:
    net = Net(lambda _, x: (F.dropout(x, 0.5, False), x * 1, x.relu()))
    before, after, report = apply(net, (X,), PASS)
    assert operators(after) == ["relu"] and len(report.edits) == 2
    assert relative_error(after(X), before(X)) == 0
    to_exported_program(after)


def test_copy_of_a_stored_tensor_that_is_an_output_stays() -> None:
    net = Net(lambda net, x: (x.sin(), net.table.clone()), table=torch.arange(4.0))
    _, _, report = apply(net, (X,), PASS)
    assert report.edits == () and reasons(report) == ["it is an output, which would be the model's own tensor"]


def test_copy_of_a_statistic_that_is_written_to_stays() -> None:
    def forward(net, x):
        before = net.norm.running_mean.clone()
        return net.norm(x), before.sin()

    net = Net(forward, norm=nn.BatchNorm2d(4)).train()
    _, after, report = apply(net, (X,), PASS)
    assert "clone" in operators(after) and "is written to" in reasons(report)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_bits(dtype: torch.dtype) -> None:
    net = Net(lambda _, x: ((x * 1).relu().relu() + 0.0).to(dtype).sin())
    x = X.to(dtype)
    _, after, report = apply(net, (x,), PASS)
    assert len(report.edits) == 4 and torch.equal(after(x), net(x))


def test_axes_of_size_zero() -> None:
    net = Net(lambda _, x: x.reshape(0, 4).repeat(1, 1).sin())
    x = torch.randn(0, 4)
    _, after, report = apply(net, (x,), PASS)
    assert len(report.edits) == 2 and after(x).shape == (0, 4)


def test_dropout_in_training_stays_and_in_evaluation_goes() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    assert apply(net.train(), (X,), PASS)[2].edits == ()
    _, after, report = apply(net.eval(), (X,), PASS)
    assert len(report.edits) == 1 and operators(after.train()) == ["linear"]


def test_gradients_stay() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(144, 3)).eval()
    before, after, report = apply(net, (X,), PASS)
    assert len(report.edits) == 2
    ours, theirs = gradients(after, (X,)), gradients(before, (X,))
    assert len(theirs) == 4 and all(relative_error(ours[name], theirs[name]) == 0 for name in theirs)


def test_limit_stops_and_leaves_a_valid_model() -> None:
    net = Net(lambda _, x: x.transpose(1, 2).contiguous().view(2, 24, 6).mul(1).add(-0.0))
    model = go.capture(net, (X,)).clone()
    rw = Rewriter(model, limit=1)
    get_pass(PASS)().run(rw)
    verify(model)
    assert operators(model) == ["transpose.int", "reshape", "mul.Tensor", "add.Tensor"]


def test_perturbation_would_be_noticed() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ReLU()).eval()
    _, after, _ = apply(net, (X,), PASS)
    weight = after.params["0.weight"]
    after.params.set("0.weight", weight.detach() * 1.01)
    assert errors_at(net, after, (X,)) > 1e-4
