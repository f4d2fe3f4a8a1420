"""Single differences: the kind, what is said of it, and beside each what is nearly it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.diff import GraphDiff
from graphopt.errors import UsageError
from tests.diff.consistent import assert_consistent, assert_mirrored
from tests.diff.nets import captured


class Of(nn.Module):
    """A function over one set of layers, so that two functions can be compared."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))
        self.conv, self.wide = nn.Conv1d(6, 6, 1), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def between(a: Callable[[Any, Tensor], Tensor], b: Callable[[Any, Tensor], Tensor], **options: Any) -> GraphDiff:
    x, y = (go.capture(Of(function).eval(), (torch.randn(3, 6),)) for function in (a, b))
    found = go.diff(x, y, **options)
    assert_consistent(found)
    assert_mirrored(found, go.diff(y, x, **options))
    return found


def kinds(found: GraphDiff) -> list[str]:
    return [entry.kind for entry in found.entries]


def test_operands_of_commutative_calls_may_be_swapped_and_no_others() -> None:
    plus = between(lambda m, x: m.one(x) + m.two(x), lambda m, x: m.two(x) + m.one(x))
    assert plus.same
    minus = between(lambda m, x: m.one(x) - m.two(x), lambda m, x: m.two(x) - m.one(x))
    assert not minus.same


def test_equal_calls_on_equal_values_are_one_value() -> None:
    found = between(
        lambda m, x: m.one(x.relu()) + m.two(x.relu()), lambda m, x: (lambda y: m.one(y) + m.two(y))(x.relu())
    )
    assert kinds(found) == ["removed"] and found.entries[0].title == "relu"


def test_an_attribute() -> None:
    found = between(lambda m, x: F.leaky_relu(m.one(x), 0.1), lambda m, x: F.leaky_relu(m.one(x), 0.2))
    (entry,) = found.entries
    assert entry.kind == "changed" and entry.title == "leaky_relu: negative_slope 0.1 -> 0.2"
    (change,) = entry.pairs[0].own
    assert (change.kind, change.name, change.before, change.after) == ("attribute", "negative_slope", 0.1, 0.2)
    near = between(
        lambda m, x: F.leaky_relu(m.one(x), 0.1), lambda m, x: F.leaky_relu(m.one(x), 0.1001), tolerance=0.01
    )
    assert near.same


def test_sizes_that_follow_are_no_difference_of_their_own() -> None:
    found = between(
        lambda m, x: F.max_pool1d(m.one(x)[:, None], 2).relu().flatten(1),
        lambda m, x: F.max_pool1d(m.one(x)[:, None], 3).relu().flatten(1),
    )
    assert len(found.entries) == 1 and "max_pool1d" in found.entries[0].title
    follows = [change for pair in found.pairs for change in pair.changes if change.derived]
    assert {change.kind for change in follows} == {"shape"} and len(follows) >= 3


def test_one_operator_for_another() -> None:
    found = between(lambda m, x: m.two(m.one(x).relu()), lambda m, x: m.two(F.gelu(m.one(x))))
    assert kinds(found) == ["rewritten"] and found.entries[0].title == "relu -> gelu"
    apart = between(lambda m, x: m.three(m.two(m.one(x).relu())), lambda m, x: F.gelu(m.three(m.two(m.one(x)))))
    assert kinds(apart) == ["removed", "inserted"]


def test_what_an_operand_reads() -> None:
    def first(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.two(y.relu()) + y

    found = between(first, lambda m, x: m.two(m.one(x).relu()) + x)
    (entry,) = found.entries
    assert entry.kind == "changed" and entry.pairs[0].own[0].kind == "operand"
    assert entry.title == "add.Tensor: operand was [linear], is [x]"
    literal = between(lambda m, x: m.one(x) + x, lambda m, x: m.one(x) + 1)
    assert kinds(literal) == ["changed"], "and so where a number stands in for it"


def test_layers_that_change_places_are_one_move() -> None:
    def first(m: Any, x: Tensor) -> Tensor:
        return m.three(m.two(m.one(x).relu()).tanh())

    def second(m: Any, x: Tensor) -> Tensor:
        return m.three(m.one(m.two(x).relu()).tanh())

    found = between(first, second)
    assert "moved" in kinds(found) and len(found.entries) <= 3


def test_a_fold_is_a_region() -> None:
    model = captured("resnet")
    folded, _ = go.run(model, "fold-batch-norm")
    found = go.diff(model, folded)
    assert_consistent(found)
    assert found.counts() == {"rewritten": 9}
    entry = found.entries[0]
    assert entry.title == "conv2d + batch_norm -> conv2d" and entry.passes == ("fold-batch-norm",)
    weight = next(change for change in entry.pairs[0].changes if change.name == "weight")
    assert weight.tensor.relation == "scaled" and weight.tensor.scale_axis == 0
    back = go.diff(folded, model)
    assert back.entries[0].title == "conv2d -> conv2d + batch_norm" and back.entries[0].passes == ("fold-batch-norm",)


def test_a_pruned_layer_names_its_channels() -> None:
    model = captured("resnet")
    pruned, _ = go.run(model, "remove-channels{layer=blocks.1.conv1,indices=2;5}")
    found = go.diff(model, pruned)
    assert_consistent(found)
    (entry,) = found.entries
    assert (entry.kind, entry.channels, entry.of, entry.passes) == ("pruned", (2, 5), 8, ("remove-channels",))
    assert entry.title == "conv2d + batch_norm + conv2d: lose 2 of 8 channels" and entry.path == "blocks.1"
    tensors = {change.tensor.name_a: change.tensor.axes[0] for pair in entry.pairs for change in pair.changes}
    assert tensors["blocks.1.conv1.weight"].axis == 0 and tensors["blocks.1.conv2.weight"].axis == 1
    assert len(tensors) == 6 and {axis.removed for axis in tensors.values()} == {(2, 5)}
    (back,) = go.diff(pruned, model).entries
    assert (back.kind, back.channels) == ("widened", (2, 5)) and "gain 2 of 8" in back.title


def test_a_pruned_layer_may_be_refitted_since() -> None:
    model = captured("resnet")
    pruned, _ = go.run(model, "remove-channels{layer=blocks.1.conv1,indices=2}")
    with torch.no_grad():
        pruned.params["blocks.1.conv2.weight"].mul_(1.01).add_(0.01)
    (entry,) = go.diff(model, pruned).entries
    refitted = entry.pairs[-1].changes[0].tensor
    assert refitted.relation == "sliced" and 0 < refitted.error < 0.2 and refitted.axes[0].removed == (2,)
    with torch.no_grad():
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
            pruned.params[f"blocks.1.{name}"].detach().add_(0.5)
    near = go.diff(model, pruned)
    assert set(kinds(near)) == {"changed"}, "nothing tells any more which channel is gone"


def test_channels_in_another_order_are_one_entry() -> None:
    model = captured("resnet")
    other = model.clone()
    order = torch.tensor([3, 1, 2, 0, 4, 7, 5, 6])
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        other.params.set(f"blocks.2.{name}", model.params[f"blocks.2.{name}"].detach()[order].clone())
    other.params.set("blocks.2.conv2.weight", model.params["blocks.2.conv2.weight"].detach()[:, order].clone())
    found = go.diff(model, other, run=True)
    (entry,) = found.entries
    assert entry.kind == "permuted" and entry.of == 8 and len(entry.pairs) == 3
    assert max(error for error in found.numbers.outputs) < 1e-5


def test_merged_products_are_a_region() -> None:
    model = captured("transformer")
    merged, _ = go.run(model, "merge-parallel-linear")
    found = go.diff(model, merged)
    assert_consistent(found)
    assert found.counts() == {"rewritten": 3}
    assert all(entry.passes == ("merge-parallel-linear",) for entry in found.entries)


def test_what_can_be_ignored() -> None:
    model = captured("mobile")
    other = model.clone()
    with torch.no_grad():
        other.params["stem.weight"].add_(0.5)
        other.params["head.3.bias"].mul_(1 + 1e-4)
    assert len(go.diff(model, other).entries) == 2
    for ignore, left in (("module=stem", 1), ("tensor=*bias", 1), ("operator=conv*", 1), ("weights", 0), ("shapes", 2)):
        found = go.diff(model, other, ignore=[ignore])
        assert (len(found.entries), found.ignored) == (left, 2 - left), ignore
    assert len(go.diff(model, other, tolerance=1e-3).entries) == 1
    for wrong in ("weight", "module=", "colour=red"):
        with pytest.raises(UsageError, match="cannot be ignored"):
            go.diff(model, other, ignore=[wrong])
    with pytest.raises(UsageError, match="tolerance is -1"):
        go.diff(model, other, tolerance=-1)


def test_graphs_without_nodes() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    nothing = go.capture(Nothing(), (torch.randn(2),))
    assert go.diff(nothing, nothing, run=True).same
    found = go.diff(nothing, captured("branches"))
    assert_consistent(found)
    assert not found.same and found.matched() == 0
