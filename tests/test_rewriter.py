"""The rewriter journals every edit, keeps shapes and tensors in step, and notices edits past it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import GraphoptError
from graphopt.fake import ShapeError
from graphopt.match import Anything, Op, Tensor, match
from graphopt.params import ParamKind
from graphopt.rewriter import Rewriter
from graphopt.transform import EditKind
from graphopt.verify import verify

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.second(self.first(y.mean((2, 3)))) + y.amax((2, 3))


def rewriter(limit: int | None = None) -> Rewriter:
    return Rewriter(go.capture(Net().eval(), (torch.randn(2, 3, 8, 8),)).clone(share_tensors=True), limit=limit)


def one(rw: Rewriter, target: object) -> torch.fx.Node:
    (node,) = rw.find(target)
    return node


def test_replace_erases_what_died_and_its_tensors() -> None:
    rw = rewriter()
    bn, conv = one(rw, aten.batch_norm.default), one(rw, aten.conv2d.default)
    rw.replace(bn, conv, "for the test")
    verify(rw.model)
    assert [edit.kind for edit in rw.edits] == [EditKind.REPLACE] and "batch_norm" in rw.edits[0].before
    assert rw.unjournaled() is None
    assert not [name for name in rw.model.state_dict() if name.startswith("bn")]
    assert rw.model.kept == {"first.weight"}


def test_tied_tensor_in_use_elsewhere_keeps_its_names() -> None:
    rw = rewriter()
    first, second = rw.find(aten.linear.default)
    rw.replace(second, first, "for the test")
    verify(rw.model)
    assert "second.bias" not in rw.params
    assert {"first.weight", "second.weight"} <= set(rw.model.state_dict())


def test_set_tensor_follows_ties_and_leaves_the_old_tensor() -> None:
    rw = rewriter()
    node = next(
        n
        for n in rw.graph.nodes
        if n.op == "get_attr"
        and str(n.target).endswith("weight")
        and n.users
        and "conv" not in str(n.target)
        and "bn" not in str(n.target)
    )
    old = rw.params[str(node.target)]
    before = old.detach().clone()
    rw.set_tensor(node, torch.zeros(4, 4), "for the test")
    verify(rw.model)
    assert rw.params["first.weight"] is rw.params["second.weight"]
    assert torch.equal(old, before) and not torch.equal(rw.params["first.weight"], before)
    assert rw.unjournaled() is None


def test_call_infers_the_shape_and_the_place() -> None:
    rw = rewriter()
    relu = one(rw, aten.relu.default)
    new = rw.call(aten.gelu.default, relu.args[0], before=relu, approximate="tanh")
    rw.replace(relu, new, "for the test")
    verify(rw.model)
    assert rw.fake(new).shape == (2, 4, 6, 6)
    assert "gelu" in str(rw.model)


def test_call_that_cannot_be_leaves_no_node() -> None:
    rw = rewriter()
    relu, count = one(rw, aten.relu.default), len(rw.graph.nodes)
    with pytest.raises(ShapeError):
        rw.call(aten.view.default, relu, [7], before=relu)
    assert len(rw.graph.nodes) == count


def test_update_by_argument_name() -> None:
    rw = rewriter()
    conv = one(rw, aten.conv2d.default)
    rw.update(conv, "for the test", padding=[1, 1], bias=None)
    assert rw.argument(conv, "padding") == [1, 1] and rw.argument(conv, "bias") is None
    assert rw.argument(conv, "stride") == [1, 1] and rw.argument(conv, "groups") == 1
    assert rw.fake(conv).shape == (2, 4, 8, 8) and "conv.bias" not in rw.params


def test_new_tensor_gets_a_free_name() -> None:
    rw = rewriter()
    node = rw.add_tensor("conv.bias", torch.ones(4), kind=ParamKind.PARAMETER)
    assert node.target == "conv.bias_1" and isinstance(rw.params["conv.bias_1"], nn.Parameter)


def test_why_shared_names_the_other_user() -> None:
    rw = rewriter()
    first, _ = rw.find(aten.linear.default)
    weight = rw.argument(first, "weight")
    assert "also used by" in str(rw.why_shared(weight, first))
    assert rw.why_shared(rw.argument(first, "bias"), first) is None


@pytest.mark.parametrize("what", ["arguments", "node", "tensor", "erased"])
def test_edits_past_the_rewriter_are_noticed(what: str) -> None:
    rw = rewriter()
    relu = one(rw, aten.relu.default)
    if what == "arguments":
        conv = one(rw, aten.conv2d.default)
        conv.args = (*conv.args[:3], [2, 2])
    elif what == "node":
        with rw.graph.inserting_after(relu):
            rw.graph.call_function(aten.relu.default, (relu,))
    elif what == "tensor":
        rw.params["conv.weight"].data.mul_(2)
        with torch.no_grad():
            rw.params["conv.weight"].mul_(2)
    else:
        relu.replace_all_uses_with(relu.args[0])
        rw.graph.erase_node(relu)
    assert rw.unjournaled() is not None


def test_limit_stops_the_search() -> None:
    rw = rewriter(limit=1)
    for linear in rw.find(aten.linear.default):
        rw.update(linear, "for the test", bias=None)
    assert len(rw.edits) == 1 and rw.exhausted


def test_erase_refuses_a_node_in_use() -> None:
    rw = rewriter()
    with pytest.raises(GraphoptError, match="has users"):
        rw.erase(one(rw, aten.relu.default), "for the test")


PATTERN = Op(
    aten.batch_norm.default,
    input=Op(aten.conv2d.default, name="conv", sole_user=True, input=Anything("x"), weight=Tensor("weight")),
    training=False,
)


def test_match_binds_names() -> None:
    rw = rewriter()
    found = match(PATTERN, one(rw, aten.batch_norm.default))
    assert found and found["conv"].target is aten.conv2d.default and found["weight"].target == "conv.weight"
    assert set(found) == {"conv", "x", "weight"}


def test_failed_match_gives_the_reason() -> None:
    rw = rewriter()
    bn = one(rw, aten.batch_norm.default)
    assert "'relu' is relu, not batch_norm" in match(PATTERN, one(rw, aten.relu.default)).reason
    needs_training = Op(aten.batch_norm.default, training=True)
    assert "training of 'batch_norm' is False, not True" in match(needs_training, bn).reason
    conv = one(rw, aten.conv2d.default)
    extra = rw.call(aten.relu.default, conv, before=bn)
    assert f"also used by '{extra.name}'" in match(PATTERN, bn).reason


def test_call_refuses_a_place_that_was_erased() -> None:
    rw = rewriter()
    relu = one(rw, aten.relu.default)
    rw.replace(relu, rw.argument(relu, "self"), "for the test")
    with pytest.raises(GraphoptError, match="was erased"):
        rw.call(aten.neg.default, one(rw, aten.conv2d.default), before=relu)


def test_the_argument_called_self_can_be_named() -> None:
    rw = rewriter()
    relu = one(rw, aten.relu.default)
    found = match(Op(aten.relu.default, self=Op(aten.batch_norm.default, name="norm")), relu)
    assert found and found["norm"].target is aten.batch_norm.default
    tanh = rw.call(aten.tanh.default, self=relu.args[0], before=relu)
    rw.update(relu, "for the test", self=tanh)
    assert rw.argument(relu, "self") is tanh


def test_discard_takes_a_call_back_without_a_trace() -> None:
    rw = rewriter()
    relu, before = one(rw, aten.relu.default), str(rw.model)
    new = rw.call(aten.gelu.default, relu.args[0], before=relu)
    rw.discard(new)
    assert str(rw.model) == before and new._erased
    assert not rw.changed and not rw.edits and not rw.misses and rw.unjournaled() is None
    verify(rw.model)
    again = rw.call(aten.tanh.default, relu.args[0], before=relu)
    rw.replace(relu, again, "for the test")
    assert rw.unjournaled() is None and "tanh" in str(rw.model)


def test_discard_of_the_first_call_leaves_a_place_for_tensors() -> None:
    rw = rewriter()
    conv = one(rw, aten.conv2d.default)
    rw.discard(rw.call(aten.neg.default, conv.args[0], before=conv))
    bias = rw.add_tensor("extra", torch.ones(4))
    rw.update(conv, "for the test", bias=bias)
    verify(rw.model)
    assert rw.unjournaled() is None


@pytest.mark.parametrize("what", ["old", "used", "tensor"])
def test_discard_refuses_what_is_part_of_the_graph(what: str) -> None:
    rw = rewriter()
    relu = one(rw, aten.relu.default)
    node = relu if what == "old" else rw.argument(one(rw, aten.conv2d.default), "weight")
    if what == "used":
        node = rw.call(aten.neg.default, relu.args[0], before=relu)
        rw.call(aten.tanh.default, node, before=relu)
    before = str(rw.model)
    with pytest.raises(GraphoptError, match=f"'{node.name}' is part of the graph"):
        rw.discard(node)
    assert str(rw.model) == before


class Reshapes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.transpose(1, 2).contiguous()).view(2, -1)


def test_refresh_infers_a_value_after_its_input_got_other_strides() -> None:
    rw = Rewriter(go.capture(Reshapes(), (torch.randn(2, 3, 4),)).clone(share_tensors=True))
    copy, relu, view = one(rw, aten.contiguous.default), one(rw, aten.relu.default), one(rw, aten.view.default)
    rw.replace(copy, rw.argument(copy, "self"), "for the test")
    assert rw.fake(relu).stride() == (12, 3, 1)
    rw.refresh(relu)
    assert rw.fake(relu).shape == (2, 4, 3) and rw.fake(relu).stride() == (12, 1, 4)
    with pytest.raises(ShapeError, match="view"):
        rw.refresh(view)
    assert [edit.node for edit in rw.edits] == [copy.name] and rw.unjournaled() is None
