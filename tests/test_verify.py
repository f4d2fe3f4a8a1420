"""The verifier: a sound graph passes, and for every invariant there is a broken graph that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import verify as verifier
from graphopt.errors import VerifyError
from graphopt.params import ParamKind
from graphopt.signature import Range
from graphopt.verify import INVARIANTS, verify

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.head, self.tail = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x)).mean((2, 3)).view(-1, 2, 4).flatten(1)
        return self.tail(self.head(self.norm(y)))


def make() -> go.Model:
    return go.capture(Net().eval(), (torch.randn(2, 4, 6, 6),), dynamic={"x": {0: "batch"}})


def node(model: go.Model, target: object) -> torch.fx.Node:
    return next(n for n in model.graph.nodes if n.target == target)


def call_method(model: go.Model) -> None:
    bn = node(model, aten.batch_norm.default)
    with model.graph.inserting_after(bn):
        method = model.graph.call_method("relu", (bn,))
    bn.replace_all_uses_with(method, delete_user_cb=lambda user: user is not method)


def missing_tensor(model: go.Model) -> None:
    node(model, "conv.weight").target = "conv.gone"


def unused_tensor(model: go.Model) -> None:
    model.params.add("extra", torch.ones(2), ParamKind.BUFFER)


def wrong_stored_shape(model: go.Model) -> None:
    conv = node(model, aten.conv2d.default)
    conv.meta["val"] = node(model, aten.linear.default).meta["val"]


def wrong_weight_shape(model: go.Model) -> None:
    model.params.set("conv.weight", torch.ones(8, 3, 3, 3))
    node(model, "conv.weight").meta["val"] = model.shapes.fake(model.params["conv.weight"])


def fixed_batch(model: go.Model) -> None:
    view = node(model, aten.view.default)
    view.args = (view.args[0], [2, 2, 4])


def other_output(model: go.Model) -> None:
    output = next(n for n in model.graph.nodes if n.op == "output")
    output.args = ((node(model, aten.layer_norm.default), node(model, aten.layer_norm.default)),)


def other_range(model: go.Model) -> None:
    model.signature = replace(model.signature, ranges={"batch": Range(), "height": Range()})


def dead_node(model: go.Model) -> None:
    conv = node(model, aten.conv2d.default)
    with model.graph.inserting_after(conv):
        relu = model.graph.call_function(aten.relu.default, (conv,))
    relu.meta["val"] = model.shapes.propagate(relu)


def wrong_order(model: go.Model) -> None:
    node(model, aten.batch_norm.default).prepend(node(model, aten.view.default))


def torn_tie(model: go.Model) -> None:
    shared = model.params["head.weight"]
    model.params._owner("tail.weight")[0]._parameters["weight"] = nn.Parameter(shared.detach())


def wrong_mask(model: go.Model) -> None:
    model.params.masks["conv.weight"] = torch.ones(8, dtype=torch.bool)


def wrong_precision(model: go.Model) -> None:
    model.params.precision["conv.weight"] = "int8"


def wrong_mode(model: go.Model) -> None:
    model.mode = "train"


def write(model: go.Model) -> None:
    conv = node(model, aten.conv2d.default)
    with model.graph.inserting_after(conv):
        relu = model.graph.call_function(aten.relu_.default, (conv,))
    conv.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    relu.meta["val"] = conv.meta["val"]


def wrong_literal(model: go.Model) -> None:
    conv = node(model, aten.conv2d.default)
    conv.args = (*conv.args[:6], 3)


BREAKAGES: list[tuple[str, Callable[[go.Model], None], str]] = [
    ("I1", call_method, "call_method"),
    ("I2", missing_tensor, "conv.gone"),
    ("I2", unused_tensor, "extra"),
    ("I3", wrong_stored_shape, "is recorded as"),
    ("I3", wrong_weight_shape, "cannot take"),
    ("I3", fixed_batch, "would require|is recorded as"),
    ("I4", other_output, "2 outputs"),
    ("I4", other_range, "height"),
    ("I5", dead_node, "nothing uses"),
    ("I5", wrong_order, "before it is computed"),
    ("I6", torn_tie, "share storage"),
    ("I7", wrong_mask, "mask of 'conv.weight'"),
    ("I7", wrong_precision, "int8"),
    ("I8", wrong_mode, "training flag of 'batch_norm'"),
    ("I9", write, "writes to its argument"),
]


def test_sound_graph_passes() -> None:
    verify(make())


@pytest.mark.parametrize(("number", "damage", "words"), BREAKAGES, ids=[f"{n}-{f.__name__}" for n, f, _ in BREAKAGES])
def test_damage_is_named(number: str, damage: Callable[[go.Model], None], words: str) -> None:
    model = make()
    damage(model)
    with pytest.raises(VerifyError, match=words) as caught:
        INVARIANTS[number](model)
    assert caught.value.what.startswith(f"{number} ")
    with pytest.raises(VerifyError):
        verify(model)


def test_literal_that_disagrees_with_its_axis() -> None:
    model = make()
    wrong_literal(model)
    with pytest.raises(VerifyError, match=r"^I10 groups"):
        INVARIANTS["I10"](model)


def test_every_invariant_has_a_broken_graph() -> None:
    assert {number for number, _, _ in BREAKAGES} | {"I10"} == set(INVARIANTS)
    assert all(f"    {number} " in (verifier.__doc__ or "") for number in INVARIANTS)


def test_errors_show_module_line_and_excerpt() -> None:
    model = make()
    wrong_weight_shape(model)
    with pytest.raises(VerifyError) as caught:
        verify(model)
    text = str(caught.value)
    assert "in module 'conv'" in text and "test_verify.py" in text and "-> %conv2d = conv2d(" in text


def test_a_refused_size_leaves_other_copies_alone() -> None:
    model = make()
    broken = model.clone(share_tensors=True)
    fixed_batch(broken)
    with pytest.raises(VerifyError):
        verify(broken)
    verify(model)
    assert "float32[batch, 8]" in str(model) and model(torch.randn(5, 4, 6, 6)).shape == (5, 8)
