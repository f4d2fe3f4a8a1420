"""Capture of nested inputs and outputs, and of free sizes: what is asked of them later, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import InputError, UnsupportedError, UsageError
from tests.test_capture import Net, net_and_model


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


torch.export.register_dataclass(Pair, serialized_type_name="tests.Pair")


class Structured(nn.Module):
    def forward(self, pair: Pair, flag: bool, scale: torch.Tensor | None = None, *, extra: dict) -> Pair:
        left = pair.left if flag else pair.right
        return Pair(left + extra["a"][0], pair.right if scale is None else pair.right * scale)


def test_structures_flags_and_keywords() -> None:
    net = Structured()
    pair = Pair(torch.randn(2, 3), torch.randn(2, 3))
    extra = {"a": [torch.randn(3)]}
    model = go.capture(net, (pair, True), {"extra": extra})
    result, expected = model(pair, True, extra=extra), net(pair, True, extra=extra)
    assert isinstance(result, Pair)
    assert torch.equal(result.left, expected.left) and torch.equal(result.right, expected.right)
    assert torch.equal(model(pair=pair, flag=True, extra=extra).left, expected.left)
    with pytest.raises(InputError, match="captured with True"):
        model(pair, False, extra=extra)


def test_wrong_inputs_are_named() -> None:
    _, model = net_and_model()
    with pytest.raises(InputError, match=r"shape \[5, 2, 8, 8\], the model takes \[n, 3, 8, 8\]"):
        model({"x": torch.randn(5, 2, 8, 8)})
    with pytest.raises(InputError, match="float64"):
        model({"x": torch.randn(5, 3, 8, 8).double()})
    with pytest.raises(InputError, match="structure"):
        model(torch.randn(5, 3, 8, 8))


@pytest.mark.parametrize(
    ("dynamic", "word"),
    [
        ({"btach": {0: "n"}}, "did you mean 'batch'"),
        ({"batch": {"y": {0: "n"}}}, "'y'"),
        ({"batch": {"x": {7: "n"}}}, "4 axes"),
        ({"batch": {"x": {0: "2n"}}}, "2n"),
        ({"batch": {"x": 3}}, "takes {axis: name}"),
    ],
)
def test_wrong_dynamic_is_explained(dynamic: dict, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        go.capture(Net().eval(), ({"x": torch.randn(2, 3, 8, 8)},), dynamic=dynamic)
    assert word in str(caught.value)


def test_equal_names_are_equal_sizes_and_multiples_hold() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y.view(x.shape[0], 2, -1).sum(1)

    net = Add()
    model = go.capture(net, (torch.randn(4, 3), torch.randn(8, 3)), dynamic={0: {0: "n"}, "y": {0: "2*n"}})
    assert model.signature.inputs[1].dims == ("2*n", 3)
    x, y = torch.randn(7, 3), torch.randn(14, 3)
    assert torch.equal(model(x, y), net(x, y))
    with pytest.raises(InputError):
        model(x, torch.randn(12, 3))


@pytest.mark.parametrize("size", [1, 4])
def test_an_example_of_size_one_leaves_the_size_free(size: int) -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, extra: dict[str, torch.Tensor]) -> torch.Tensor:
            return x * 2 + extra["y"][: x.shape[0]]

    example = (torch.randn(size, 3), {"y": torch.randn(2 * size, 3)})
    model = go.capture(Add(), example, dynamic={"x": {0: "n"}, "extra": {"y": {0: "2*n"}}})
    x, y = torch.randn(5, 3), torch.randn(10, 3)
    assert torch.equal(model(x, {"y": y}), Add()(x, {"y": y}))
    assert model(torch.randn(1, 3), {"y": torch.randn(2, 3)}).shape == (1, 3)


class Outputs(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


def test_a_namedtuple_comes_back(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Outputs:
            return Outputs(x + 1, x * 2)

    model = go.capture(Net(), (torch.ones(2),))
    assert isinstance(model(torch.ones(2)), Outputs) and model.signature.outputs[0].name == "logits"
    model.save(tmp_path / "net.gopt")
    assert isinstance(go.load(tmp_path / "net.gopt")(torch.ones(2)), Outputs)


def test_a_limit_of_the_model_narrows_the_range() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[: x.shape[1]]

    model = go.capture(Positions(), (torch.randn(2, 5, 4),), dynamic={"x": {0: "n", 1: "length"}})
    assert model.signature.ranges["length"].max == 16 and model.signature.ranges["n"].max is None
    assert model(torch.randn(3, 16, 4)).shape == (3, 16, 4)
    with pytest.raises(InputError, match=r"'length' must lie in 0\.\.16"):
        model(torch.randn(3, 17, 4))


BRANCHES = {
    "multiple of both": lambda a, b: (a * b) % 7 == 0,
    "even": lambda a, b: a % 2 == 0,
    "more than four": lambda a, b: a > 4,
    "large area": lambda a, b: a * b > 40,
    "square": lambda a, b: a == b,
}


@pytest.mark.parametrize("size", [(7, 5), (6, 9)], ids=str)
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_on_sizes_is_right_or_refused(branch: str, size: tuple[int, int]) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if BRANCHES[branch](x.shape[0], x.shape[1]) else x + 1

    try:
        model = go.capture(Net(), (torch.randn(size),), dynamic={"x": {0: "a", 1: "b"}})
    except UnsupportedError as error:
        assert "`dynamic` leaves free" in str(error)
        return
    answered = 0
    for other in [(a, b) for a in range(2, 12) for b in range(2, 12)]:
        x = torch.randn(other)
        try:
            result = model(x)
        except InputError as error:
            assert "captured for sizes with" in str(error) or "must lie in" in str(error)
            assert BRANCHES[branch](*other) != BRANCHES[branch](*size) or branch == "more than four"
            continue
        answered += 1
        assert torch.equal(result, Net()(x)), other
    assert answered > 10


def test_conditions_reach_files_and_nested_inputs(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor], *more: torch.Tensor) -> torch.Tensor:
            x = batch["x"]
            return x * 2 if x.shape[0] * more[0].shape[0] % 3 == 0 else x + 1

    example = ({"x": torch.randn(6, 2)}, torch.randn(4, 2))
    model = go.capture(Net(), example, dynamic={"batch": {"x": {0: "a"}}, "more": ({0: "b"},)})
    model.save(tmp_path / "net.gopt")
    model.save(tmp_path / "net.pt2")
    for each in (model, go.load(tmp_path / "net.gopt")):
        assert len(each.signature.conditions) == 1 and "given" in str(each.signature)
        assert each({"x": torch.randn(2, 2)}, torch.randn(6, 2)).shape == (2, 2)
        with pytest.raises(InputError, match="captured for sizes with"):
            each({"x": torch.randn(2, 2)}, torch.randn(2, 2))


def test_weights_without_data_are_no_ties_of_each_other() -> None:
    """On the meta device every address is zero; only what is one tensor in the module is tied."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        net[2].weight = net[0].weight
    model = go.capture(net, (torch.zeros(1, 4, device="meta"),))
    assert model.params.ties() == [frozenset({"0.weight", "2.weight"})]
