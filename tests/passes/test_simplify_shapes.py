from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.passes._renumbering import Plan, Renumbering, plan
from graphopt.registry import get_pass
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons

PASS = "simplify-shapes"
X = torch.randn(2, 6, 4, 5)
BATCH = {"x": {0: "batch"}}

# A function of x [2, 6, 4, 5], and what is left of it.
SHORTER = {
    "reshapes": (lambda x: x.flatten(1).view(2, 6, -1).unsqueeze(0).view(2, 120), ["reshape"]),
    "reshapes there and back": (lambda x: x.flatten(1).unflatten(1, (6, 4, 5)), []),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(1).squeeze(1), []),
    "permutations": (lambda x: x.permute(0, 2, 3, 1).transpose(1, 2).movedim(-1, 0), ["permute"]),
    "permutations there and back": (lambda x: x.transpose(1, 2).transpose(2, 1), []),
    "copy between": (lambda x: x.transpose(1, 2).contiguous().flatten(1), ["permute", "reshape"]),
    "channel shuffle": (
        lambda x: x.view(2, 2, 3, 4, 5).transpose(1, 2).contiguous().view(2, 6, 4, 5),
        ["reshape", "permute", "reshape"],
    ),
    "attention heads by way of a large batch": (
        lambda x: x[..., 0].reshape(2, 12, 2).transpose(0, 1).reshape(6, 2, 2, 2),
        ["select.int", "reshape", "permute"],
    ),
    "queries, keys and values": (
        lambda x: x.flatten(2).unflatten(-1, (5, 4)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous(),
        ["reshape", "permute"],
    ),
    "permutation of axes of one": (lambda x: x[:, :1].permute(1, 0, 2, 3), ["slice.Tensor", "reshape"]),
    "expansions": (lambda x: x[:, :1].expand(2, 6, 4, 5).expand(3, 2, 6, 4, 5), ["slice.Tensor", "expand"]),
    "slices": (lambda x: x[:, 1:][:, ::2][:, -2:], ["slice.Tensor"]),
    "concatenations": (lambda x: torch.cat([torch.cat([x, x + 1], 1), x], -3), ["add.Tensor", "cat"]),
}


@pytest.mark.parametrize("name", SHORTER)
def test_chain_becomes_the_shortest_that_does_the_same(name: str) -> None:
    function, left = SHORTER[name]
    net = Net(lambda _, x: function(x.sin()).exp())
    _, after, report = apply(net, (X,), PASS)
    assert operators(after) == ["sin", *left, "exp"] and len(report.edits) >= 1
    with torch.no_grad():
        assert torch.equal(after(X), net(X))
    assert go.run(after, PASS)[1][0].edits == ()


SHORTEST = {
    "one reshape": lambda x: x.flatten(1),
    "one permutation": lambda x: x.transpose(1, 2),
    "permutation, then reshape": lambda x: x.transpose(1, 2).reshape(2, 24, 5),
    "reshape, then permutation": lambda x: x.view(2, 2, 3, 4, 5).transpose(1, 2),
    "slices of two axes": lambda x: x[:, 1:, 1:],
    "concatenations along two axes": lambda x: torch.cat([torch.cat([x, x], 1), torch.cat([x, x], 1)], 2),
    "expansion of a sum": lambda x: (x[:, :1].expand(2, 6, 4, 5) + 1).expand(3, 2, 6, 4, 5),
}


@pytest.mark.parametrize("name", SHORTEST)
def test_chain_that_is_short_stays(name: str) -> None:
    function = SHORTEST[name]
    net = Net(lambda _, x: function(x.sin()).exp())
    before, after, report = apply(net, (X,), PASS)
    assert report.edits == () and operators(after) == operators(before)


def test_value_that_others_use_stays_and_is_passed_by() -> None:
    net = Net(lambda _, x: (lambda moved: (moved.sin(), moved.transpose(1, 2).exp()))(x.transpose(1, 2)))
    _, after, report = apply(net, (X,), PASS)
    assert operators(after) == ["transpose.int", "sin", "exp"] and len(report.edits) == 1
    assert errors_at(net, after, (X,)) == 0
    does_not_pay = Net(lambda _, x: (lambda flat: (flat.sin(), flat.view(2, 6, 20).exp()))(x.flatten(1)))
    assert apply(does_not_pay, (X,), PASS)[2].edits == ()


def test_slice_that_others_use_stays() -> None:
    net = Net(lambda _, x: (lambda part: part.sin().sum() + part[:, ::2])(x[:, 1:]))
    assert apply(net, (X,), PASS)[2].edits == ()


FREE = {
    "one free size is -1": (lambda x: x.flatten(2).reshape(-1, 12, 10), ["reshape"]),
    "a product of a free size": (lambda x: x.reshape(-1, 4, 5).reshape(x.shape[0], 6, 20), ["reshape"]),
    "heads": (
        lambda x: x[..., 0].reshape(x.shape[0] * 2, 3, 4).transpose(1, 2).reshape(x.shape[0], 2, 4, 3).contiguous(),
        ["select.int", "reshape", "permute"],
    ),
    "free axis moves": (lambda x: x.permute(1, 0, 2, 3).flatten(2).permute(1, 0, 2), ["reshape"]),
}


@pytest.mark.parametrize("name", FREE)
def test_free_sizes(name: str) -> None:
    function, left = FREE[name]
    net = Net(lambda _, x: function(x.sin()).exp())
    _, after, report = apply(net, (X,), PASS, dynamic=BATCH)
    assert [op for op in operators(after) if op not in ("sym_size.int", "mul")] == ["sin", *left, "exp"]
    assert len(report.edits) >= 1
    inputs = [(torch.randn(batch, 6, 4, 5),) for batch in (1, 2, 5)]
    assert errors_at(net, after, *inputs) == 0
    assert after(torch.randn(0, 6, 4, 5)).numel() == 0


def test_two_free_sizes_are_reused_where_something_computes_them() -> None:
    net = Net(lambda _, x: x.sin().flatten(2).reshape(x.shape[0], 2, 3, x.shape[2], 5).exp())
    _, after, report = apply(net, (X,), PASS, dynamic={"x": {0: "batch", 2: "rows"}})
    assert operators(after) == ["sym_size.int", "sym_size.int", "sin", "reshape", "exp"] and len(report.edits) == 1
    assert errors_at(net, after, (X,), (torch.randn(3, 6, 7, 5),)) == 0
    unknown = Net(lambda _, x: x.sin().flatten(2).unflatten(1, (2, 3)).exp())
    _, _, report = apply(unknown, (X,), PASS, dynamic={"x": {0: "batch", 2: "rows"}})
    assert report.edits == () and reasons(report) == ["nothing computes the free sizes of [batch, 2, 3, 5*rows]"]


def test_squeezing_a_free_axis_ends_a_chain() -> None:
    net = Net(lambda _, x: x.sin().unsqueeze(0).squeeze(1).exp())
    assert apply(net, (X,), PASS, dynamic=BATCH)[2].edits == ()


def test_axes_of_size_zero_end_a_chain() -> None:
    net = Net(lambda _, x: x.sin().flatten(1).reshape(4, 0).exp())
    x = torch.randn(2, 0, 3)
    _, after, report = apply(net, (x,), PASS)
    assert report.edits == () and after(x).shape == (4, 0)


def test_axes_that_a_reshape_cuts_end_a_chain() -> None:
    net = Net(lambda _, x: x.sin().transpose(1, 2).reshape(2, 3, 8, 5).transpose(1, 2).reshape(2, 12, 10).exp())
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == () and errors_at(net, after, (X,)) == 0


def test_views_behind_become_reshapes() -> None:
    net = Net(lambda _, x: x.transpose(1, 2).contiguous().relu().view(2, 24, 5))
    _, after, _ = apply(net, (X,), PASS)
    assert operators(after) == ["permute", "relu", "reshape"] and errors_at(net, after, (X,)) == 0


def test_output_does_not_become_the_models_own_tensor() -> None:
    net = Net(lambda net, x: (x.sin(), net.weight.t().t()), weight=nn.Parameter(torch.randn(3, 4)))
    _, _, report = apply(net, (X,), PASS)
    assert report.edits == () and reasons(report) == ["it is an output, which would be the model's own tensor"]


def test_gradients_stay() -> None:
    net = Net(lambda net, x: net.layer(x).transpose(1, 2).contiguous().view(2, 24, 3).sin(), layer=nn.Linear(5, 3))
    before, after, report = apply(net, (X,), PASS)
    assert len(report.edits) == 1
    ours, theirs = gradients(after, (X,)), gradients(before, (X,))
    assert len(theirs) == 2 and all(relative_error(ours[name], theirs[name]) < 1e-6 for name in theirs)


def test_limit_stops_and_leaves_a_valid_model() -> None:
    net = Net(lambda _, x: x.transpose(1, 2).contiguous().view(2, 24, 5).sin().flatten(1).view(2, 24, 5))
    model = go.capture(net, (X,)).clone()
    rw = Rewriter(model, limit=1)
    get_pass(PASS)().run(rw)
    verify(model)
    assert operators(model) == ["permute", "reshape", "sin", "flatten.using_ints", "view"]


def test_long_chain_is_shortened_in_linear_time() -> None:
    def forward(_, x):
        for _ in range(40):
            x = x.transpose(1, 2).flatten(2).unflatten(2, (x.shape[1], 5)).contiguous()
        return x

    _, after, report = apply(Net(forward), (X,), PASS)
    assert operators(after) == [] and len(report.edits) < 60


def rearranged(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """Some reshapes, permutations, copies, slices and concatenations of x; values in between are used elsewhere too."""
    draw, values = random.Random(seed), [x]
    for _ in range(draw.randint(3, 9)):
        y = values[-1] if draw.random() < 0.8 else draw.choice(values)
        axis = draw.randrange(y.dim())
        order = draw.sample(range(y.dim()), y.dim())
        flat = y.flatten(axis, draw.randrange(axis, y.dim()))
        pairs = [(y.unflatten(i, (2, -1)),) for i, n in enumerate(y.shape) if isinstance(n, int) and n and n % 2 == 0]
        ways = [y.permute(order), y.unsqueeze(axis), y.contiguous(), flat, *draw.choice(pairs or [()])]
        ways += [
            y.transpose(axis, -1),
            torch.cat([torch.cat([y, y + 1], axis), y], axis),
            y[(slice(None),) * axis + (slice(1),)],
        ]
        made = draw.choice(ways)
        values.append(made if made.dim() < 7 and axis else y.permute(order))
    return (*draw.sample(values[1:-1], 2), values[-1].sin())


@pytest.mark.parametrize("seed", range(16))
def test_random_rearrangements(seed: int) -> None:
    net = Net(lambda _, x: rearranged(x, seed))
    before, after, _ = apply(net, (torch.randn(3, 1, 4, 6),), PASS, dynamic=BATCH)
    for batch in (1, 3, 4):
        x = torch.randn(batch, 1, 4, 6)
        assert relative_error(after(x), before(x)) == 0
    assert len(operators(after)) <= len(operators(before))
    assert go.run(after, PASS)[1][0].edits == ()


@pytest.mark.parametrize("seed", range(40))
def test_plans_do_what_the_chain_does(seed: int) -> None:
    """The algebra by itself, against torch, on random chains of reshapes and permutations."""
    draw = random.Random(seed)
    shape = draw.choice([(2, 3, 4), (4, 1, 6), (2, 2, 2, 3), (12,), (1, 1, 5)])
    source = value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    what = Renumbering.identity(shape)
    for _ in range(6):
        if draw.random() < 0.5:
            order = draw.sample(range(value.dim()), value.dim())
            value, what = value.permute(order), what.permuted(order)
        else:
            target = draw.choice(
                [(-1,), (2, -1), (*value.shape, 1), (*value.shape[:-2], -1), (*value.shape[1:], value.shape[0])]
            )
            if value.numel() % 2 and 2 in target:
                continue
            reshaped = what.reshaped(tuple(value.reshape(target).shape))
            if reshaped is None:
                continue
            value, what = value.reshape(target), reshaped
    assert what.shape == tuple(value.shape)
    found = plan(what)
    assert isinstance(found, Plan)
    result = source if found.split is None else source.reshape(found.split)
    result = result if found.order is None else result.permute(found.order)
    result = result if found.shape is None else result.reshape(found.shape)
    assert torch.equal(result, value)
