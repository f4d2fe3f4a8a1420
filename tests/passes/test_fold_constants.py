from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.params import ParamKind
from graphopt.rewriter import Rewriter
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons

PASS = "fold-constants"
X = torch.randn(2, 6, 4)
BATCH = {"x": {0: "batch"}}

FOLDED = {
    "created": lambda net, x: x + torch.arange(4).float().sin(),
    "created like an input of free size": lambda net, x: x + x.new_ones(4).cumsum(0),
    "from a table": lambda net, x: x * net.table.exp()[2:].reshape(-1),
    "pieces of a table": lambda net, x: x * net.table.split(4)[0] + net.table.split([4, 2])[0],
    "in an integer dtype": lambda net, x: x + (torch.arange(4) // 3 % 2),
    "a mask": lambda net, x: x.masked_fill(torch.arange(4) > 1, 0.0),
    "assigned piece by piece": lambda net, x: x + torch.zeros(6, 4).slice_scatter(net.table[:4].expand(2, 4), 0, 1, 3),
    "indexed": lambda net, x: x[:, torch.arange(3) * 2 - 1],
}


@pytest.mark.parametrize("name", FOLDED)
def test_constant_parts_are_computed_beforehand(name: str) -> None:
    net = Net(FOLDED[name], table=torch.randn(6))
    before, after, report = apply(net, (X,), PASS, dynamic=BATCH)
    assert 1 <= len(report.edits) <= 2 and len(operators(after)) < len(operators(before))
    assert all(after.params.kind(edit.after.split("'")[1]) is ParamKind.CONSTANT for edit in report.edits)
    with torch.no_grad():
        assert torch.equal(after(X), net(X)) and torch.equal(after(X[:1]), net(X[:1]))
    assert go.run(after, PASS)[1][0].edits == ()


OTHERS = {
    "random numbers": lambda net, x: x + torch.rand(4),
    "a free size": lambda net, x: x + torch.arange(x.shape[0]).float().reshape(-1, 1, 1),
    "an input": lambda net, x: (x * net.table[:4].sum(0)).exp(),
    "an expansion of a constant": lambda net, x: x + net.table[:1].clone().expand(6, 4),
}


@pytest.mark.parametrize("name", ["random numbers", "a free size"])
def test_what_differs_from_run_to_run_stays(name: str) -> None:
    net = Net(OTHERS[name], table=torch.randn(6))
    before, after, report = apply(net, (X,), PASS, dynamic=BATCH)
    assert report.edits == () and operators(after) == operators(before)


def test_only_what_others_need_is_stored() -> None:
    net = Net(OTHERS["an input"], table=torch.randn(6))
    _, after, report = apply(net, (X,), PASS)
    assert operators(after) == ["mul.Tensor", "exp"] and len(report.edits) == 1
    assert list(after.params) == ["constants.sum_1"]


def test_expansion_is_left_to_run_time() -> None:
    net = Net(OTHERS["an expansion of a constant"], table=torch.randn(6))
    _, after, report = apply(net, (X,), PASS)
    assert operators(after) == ["expand", "add.Tensor"] and len(report.edits) == 1
    assert sum(tensor.nbytes for tensor in after.params.values()) == 4


def test_size_limit_counts_what_is_freed() -> None:
    grows = Net(lambda net, x: x + torch.zeros(200, 6, 4).exp().sum(0))
    _, _, report = apply(grows, (X,), f"{PASS}{{size-limit=1000}}")
    assert report.edits == ()
    assert reasons(report) == ["its 19200 bytes are more than the 0 it frees and 1000"]
    _, after, report = apply(grows, (X,), PASS)
    assert len(report.edits) == 1 and operators(after) == ["add.Tensor"]
    replaces = Net(lambda net, x: x @ net.table.t(), table=torch.randn(3, 4))
    assert len(apply(replaces, (X,), f"{PASS}{{size-limit=0}}")[2].edits) == 1
    adds = Net(lambda net, x: x @ net.table.t() + net.table.sum(), table=torch.randn(3, 4))
    _, after, report = apply(adds, (X,), f"{PASS}{{size-limit=0}}")
    assert report.edits == () and len(report.misses) == 2


def test_many_runs_grow_a_model_no_more_than_one() -> None:
    """What an earlier run stored does not count as freed: each run would add the limit anew."""
    net = Net(lambda net, x: x + torch.ones(8).repeat(2).repeat(2).repeat(2).sum())
    model = go.capture(net, (X,))
    for limit in (32, 64, 100):
        once, (first,) = go.run(model, f"{PASS}{{size-limit={limit}}}")
        twice, (second,) = go.run(once, f"{PASS}{{size-limit={limit}}}")
        assert second.edits == () and str(twice) == str(once)
        assert sum(tensor.nbytes for tensor in twice.params.values()) <= limit, first


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_stay_frozen_ones_too(frozen: bool) -> None:
    net = Net(lambda net, x: x * net.scale.exp(), scale=nn.Parameter(torch.randn(4), requires_grad=not frozen))
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == () and reasons(report) == ["it reads the parameter 'scale', which can be trained"]
    assert list(after.state_dict()) == ["scale"]


def test_statistics_stay_while_a_norm_can_train_them() -> None:
    net = Net(lambda net, x: net.norm(x) * (net.norm.running_var + 1).reshape(-1, 1), norm=nn.BatchNorm1d(6))
    for training in (True, False):
        _, after, report = apply(net.train(training), (X,), PASS)
        assert report.edits == () and "norm.running_var" in after.params


def test_statistics_of_a_norm_written_by_hand_fold() -> None:
    net = Net(lambda net, x: (x - net.mean) * torch.rsqrt(net.var + 1e-5), mean=torch.randn(4), var=torch.rand(4) + 1)
    _, after, report = apply(net, (X,), PASS)
    assert operators(after) == ["sub.Tensor", "mul.Tensor"] and len(report.edits) == 1
    assert errors_at(net, after, (X,)) == 0


def test_output_that_is_constant_stays_a_call() -> None:
    net = Net(lambda net, x: (x.sin(), net.table * 2), table=torch.arange(3.0))
    _, after, report = apply(net, (X,), PASS)
    assert report.edits == () and reasons(report) == ["it is an output, which would be the model's own tensor"]
    assert torch.equal(after(X)[1], torch.tensor([0.0, 2.0, 4.0]))


def test_precision_record_keeps_a_tensor() -> None:
    model = go.capture(Net(lambda net, x: x * net.table.exp(), table=torch.randn(4)), (X,))
    model.params.precision["table"] = "float16"
    _, (report,) = go.run(model, PASS)
    assert report.edits == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_bit_by_bit(dtype: torch.dtype) -> None:
    net = Net(lambda net, x: x * (net.table / 3).exp(), table=torch.randn(4, dtype=dtype))
    _, after, report = apply(net, (X.to(dtype),), PASS)
    assert len(report.edits) == 1 and next(iter(after.params.values())).dtype is dtype
    assert torch.equal(after(X.to(dtype)), net(X.to(dtype)))


def test_zero_sized_constants() -> None:
    net = Net(lambda net, x: torch.cat([x, net.table[:0].exp().reshape(2, 0, 4)], 1), table=torch.randn(4))
    _, after, _ = apply(net, (X,), PASS)
    assert errors_at(net, after, (X,)) == 0


def test_sizes_that_are_numbers_are_written_into_calls() -> None:
    model = go.capture(Net(lambda _, x: x.sin()), (X,)).clone()
    rw = Rewriter(model)
    sin = next(iter(rw.find()))
    output = next(node for node in model.graph.nodes if node.op == "output")
    size = rw.call(torch.ops.aten.sym_size.int, sin, 1, before=output)
    flat = rw.call(torch.ops.aten.reshape.default, sin, [2, size, 4], before=output)
    output.args = ((flat,),)
    after, (report,) = go.run(model, PASS)
    assert [edit.why for edit in report.edits] == ["'sym_size_int' is always 6"]
    assert operators(after) == ["sin", "reshape"]


def test_gradients_stay() -> None:
    net = Net(lambda net, x: net.layer(x) * net.table.exp(), layer=nn.Linear(4, 4), table=torch.randn(4))
    before, after, report = apply(net, (X,), PASS)
    assert len(report.edits) == 1
    ours, theirs = gradients(after, (X,)), gradients(before, (X,))
    assert len(theirs) == 2 and all(relative_error(ours[name], theirs[name]) == 0 for name in theirs)


def test_perturbation_would_be_noticed() -> None:
    net = Net(FOLDED["from a table"], table=torch.randn(6))
    _, after, _ = apply(net, (X,), PASS)
    (name,) = after.params
    after.params.set(name, after.params[name] * 1.01)
    assert errors_at(net, after, (X,)) > 1e-3
