from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import graphopt as go
from graphopt.params import ParamKind
from graphopt.registry import get_pass
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons

PASS = "dead-code"
X = torch.randn(2, 6, 4)
aten = torch.ops.aten


def with_dead(module: nn.Module, *calls: tuple) -> go.Model:
    """The captured module with calls on its input that nothing uses."""
    model = go.capture(module, (X,)).clone()
    rw = Rewriter(model)
    x = next(node for node in model.graph.nodes if node.op == "placeholder")
    first = next(iter(rw.find()))
    for op, *args in calls:
        rw.call(op, x, *args, before=first)
    return model


def cleaned(model: go.Model) -> tuple[list[str], Rewriter]:
    rw = Rewriter(model)
    get_pass(PASS)().run(rw)
    verify(model)
    return operators(model), rw


def test_unused_operators_go_with_what_only_they_used() -> None:
    model = go.capture(Net(lambda _, x: x.sin()), (X,)).clone()
    rw = Rewriter(model)
    x, sin = next(iter(model.graph.nodes)), next(iter(rw.find()))
    table = rw.add_tensor("table", torch.ones(4), kind=ParamKind.BUFFER)
    rw.call(aten.exp.default, rw.call(aten.mul.Tensor, x, table, before=sin), before=sin)
    names, report = cleaned(model)
    assert names == ["sin"] and len(report.edits) == 1 and "table" not in model.params


def test_unused_random_numbers_go_unless_later_ones_depend_on_them() -> None:
    draws = (aten.rand_like.default,)
    names, rw = cleaned(with_dead(Net(lambda _, x: x.sin()), draws))
    assert names == ["sin"] and len(rw.edits) == 1
    names, rw = cleaned(with_dead(Net(lambda _, x: x + torch.rand_like(x)), draws))
    assert names == ["rand_like", "rand_like", "add.Tensor"] and rw.edits == []
    assert reasons(rw) == ["nothing uses it, but operators after it would draw other random numbers"]


def test_unused_norm_in_training_stays() -> None:
    def forward(net, x):
        net.norm(x)
        return x.sin()

    net = Net(forward, norm=nn.BatchNorm1d(6)).train()
    _, after, report = apply(net, (X,), PASS)
    assert "batch_norm" in operators(after) and "add_.Tensor" in operators(after)
    assert reasons(report) == ["nothing uses it, but it updates running statistics"]


def test_pieces_that_are_used_become_slices() -> None:
    cases = {
        "split": (lambda x: x.split(2, 1)[1].sin(), 1, "slice.Tensor"),
        "split of sizes": (lambda x: x.split([1, 2, 3], 1)[2].sin(), 1, "slice.Tensor"),
        "chunk of which two are used": (lambda x: x.chunk(3, -2)[0] * x.chunk(3, -2)[0], 2, "slice.Tensor"),
        "unbind": (lambda x: x.unbind(1)[-1].sin(), 1, "select.int"),
    }
    for name, (function, count, operator) in cases.items():
        net = Net(lambda _, x, function=function: function(x))
        _, after, report = apply(net, (X,), PASS, dynamic={"x": {0: "batch"}})
        assert operators(after).count(operator) == len(report.edits) == count, name
        assert errors_at(net, after, (X,), (torch.randn(5, 6, 4),)) == 0
        assert go.run(after, PASS)[1][0].edits == ()


def test_split_of_which_every_piece_is_used_stays() -> None:
    net = Net(lambda _, x: x.split(3, 1)[0] * 2 + x.split(3, 1)[1])
    model, _ = go.run(go.capture(net, (X,)), "common-subexpressions")
    after, (report,) = go.run(model, PASS)
    assert report.edits == () and operators(after).count("split.Tensor") == 1


def test_pieces_behind_a_free_size_stay() -> None:
    net = Net(lambda _, x: torch.cat([x, x]).split([x.shape[0], x.shape[0]])[1].sin())
    _, _, report = apply(net, (X,), PASS, dynamic={"x": {0: "batch"}})
    assert report.edits == ()
    assert reasons(report) == ["1 of 2 pieces are used, but where they start depends on a free size"]


def test_unused_indices_of_a_pool_go_and_used_ones_stay() -> None:
    net = Net(lambda _, x: F.max_pool1d(x, 2, return_indices=True)[0])
    before, after, report = apply(net, (X,), PASS)
    assert operators(before)[0] == "max_pool1d_with_indices" and operators(after) == ["max_pool1d"]
    assert len(report.edits) == 1 and errors_at(net, after, (X,)) == 0
    both = Net(lambda _, x: F.max_pool1d(x, 2, return_indices=True))
    assert apply(both, (X,), PASS)[2].edits == ()


def test_maximum_keeps_its_unused_indices_for_its_gradient() -> None:
    _, after, report = apply(Net(lambda _, x: x.max(1)[0]), (X,), PASS)
    assert "max.dim" in operators(after) and "spread the gradient" in reasons(report)[0]


def test_inputs_and_state_that_nothing_uses_stay() -> None:
    net = Net(lambda net, x: net.used(x), used=nn.Linear(4, 4), unused=nn.Linear(4, 4))
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == () and set(after.state_dict()) == set(net.state_dict())


def test_gradients_stay() -> None:
    net = Net(lambda net, x: net.layer(x).split(2, 2)[1], layer=nn.Linear(4, 4))
    before, after, report = apply(net, (X,), PASS)
    assert len(report.edits) == 1
    ours, theirs = gradients(after, (X,)), gradients(before, (X,))
    assert all(relative_error(ours[name], theirs[name]) == 0 for name in theirs)
