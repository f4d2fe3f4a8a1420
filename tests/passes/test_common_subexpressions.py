from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt as go
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons

PASS = "common-subexpressions"
X = torch.randn(2, 6, 4)

EQUAL = {
    "same call": (lambda x: x.sin() * x.sin(), 1),
    "chains": (lambda x: x.sin().exp() - x.sin().exp(), 2),
    "swapped operands": (lambda x: (x + x.sin()) * (x.sin() + x), 2),
    "default arguments": (lambda x: x.softmax(1) + F.softmax(x, 1, dtype=None), 1),
    "pieces": (lambda x: x.split(2, 1)[0] + x.split(2, 1)[0], 1),
    "random numbers of none": (lambda x: torch.arange(4) * x + torch.arange(4), 1),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_calls_become_one(name: str) -> None:
    function, count = EQUAL[name]
    net = Net(lambda _, x: function(x))
    before, after, report = apply(net, (X,), PASS, dynamic={"x": {0: "batch"}})
    assert len(report.edits) >= count and len(operators(after)) <= len(operators(before)) - count
    assert errors_at(net, after, (X,), (torch.randn(5, 6, 4),)) == 0
    assert go.run(after, PASS)[1][0].edits == ()


UNEQUAL = {
    "other argument": lambda x: x.softmax(1) + x.softmax(2),
    "swapped operands of a difference": lambda x: (x - x.sin()) * (x.sin() - x),
    "1 and 1.0": lambda x: (x > 0) * 1 + (x > 0) * 1.0,
    "0.0 and -0.0": lambda x: (x + 0.0) / (x + -0.0),
    "scaled sum": lambda x: torch.add(x, x.relu(), alpha=2) + torch.add(x.relu(), x, alpha=2),
    "other piece": lambda x: (lambda pieces: pieces[0] + pieces[1])(x.split(3, 1)),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_calls_that_differ_stay(name: str) -> None:
    function = UNEQUAL[name]
    net = Net(lambda _, x: function(x))
    model = go.capture(net, (X,))
    once, _ = go.run(model, PASS)
    kept = ("softmax.int", "sub.Tensor", "mul.Tensor", "add.Tensor", "getitem")
    for operator in kept:
        if operators(model).count(operator) > 1:
            assert operators(once).count(operator) == operators(model).count(operator)
    assert errors_at(net, once, (X,)) == 0


def test_random_numbers_are_drawn_each_time() -> None:
    net = Net(lambda _, x: torch.rand_like(x) + torch.rand_like(x))
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == () and operators(after).count("rand_like") == 2
    assert reasons(report) == ["it is not the same at every call"]


@pytest.mark.parametrize("training", [True, False])
def test_dropouts_stay_two(training: bool) -> None:
    """In evaluation too: trained again, the model is to draw two masks."""
    net = Net(lambda net, x: net.drop(x) + net.drop(x), drop=nn.Dropout()).train(training)
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == () and operators(after).count("dropout") == 2 and len(report.misses) == 1


def test_norms_that_would_count_twice_stay_two() -> None:
    net = Net(lambda net, x: net.norm(x) + net.norm(x), norm=nn.BatchNorm1d(6))
    _, after, report = apply(net, (X,), PASS)
    assert operators(after).count("batch_norm") == 2
    assert reasons(report) == ["in training it would be another call: it draws or counts anew"]


def test_statistics_are_read_again_after_they_were_written() -> None:
    def forward(net, x):
        before = net.norm.running_mean + 1
        y = net.norm(x)
        return y, before, net.norm.running_mean + 1

    net = Net(forward, norm=nn.BatchNorm1d(6)).train()
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == ()
    _, before_mean, after_mean = after(X)
    assert not torch.equal(before_mean, after_mean)


def test_equal_constants_become_one_and_parameters_and_buffers_do_not() -> None:
    equal = Net(lambda net, x: x * net.a + net.b, a=torch.ones(4), b=torch.ones(4))
    _, after, report = apply(equal, (X,), PASS)
    assert [edit.why for edit in report.edits] == ["equal to 'a'"] and list(after.params) == ["a"]
    assert errors_at(equal, after, (X,)) == 0
    other_dtype = Net(lambda net, x: x * net.a + net.b, a=torch.ones(4), b=torch.ones(4, dtype=torch.float64))
    assert apply(other_dtype, (X,), PASS)[2].edits == ()
    trained = Net(lambda net, x: x * net.a + net.b, a=nn.Parameter(torch.ones(4)), b=nn.Parameter(torch.ones(4)))
    assert apply(trained, (X,), PASS)[2].edits == ()
    saved = Net(lambda net, x: x * net.a + net.b, a=torch.ones(4), b=torch.ones(4))
    saved._non_persistent_buffers_set.clear()
    assert apply(saved, (X,), PASS)[2].edits == ()


def test_tied_weights_keep_their_names() -> None:
    net = Net(lambda net, x: net.one(x) * net.two(x), one=nn.Linear(4, 4, bias=False), two=nn.Linear(4, 4, bias=False))
    net.two.weight = net.one.weight
    _, after, _ = apply(net, (X,), PASS)
    assert set(after.state_dict()) == {"one.weight", "two.weight"}
    assert after.params["one.weight"] is after.params["two.weight"]
    assert errors_at(net, after, (X,)) < 1e-6


def test_gradients_stay() -> None:
    net = Net(lambda net, x: net.layer(x).sin() + net.layer(x).exp(), layer=nn.Linear(4, 4))
    before, after, report = apply(net, (X,), PASS)
    assert len(report.edits) == 1 and operators(after).count("linear") == 1
    ours, theirs = gradients(after, (X,)), gradients(before, (X,))
    assert all(relative_error(ours[name], theirs[name]) < 1e-6 for name in theirs)
