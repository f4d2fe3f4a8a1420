"""Sizes that depend on the values of a tensor: refused by name in an output, carried inside of a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import UnsupportedError


class Inner(nn.Module):
    def __init__(self, step: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Any:
        return self.step(x)


class Net(nn.Module):
    def __init__(self, step: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head = Inner(step)

    def forward(self, x: Tensor) -> Any:
        return {"kept": x + 1, "found": self.head(x)}


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "index.Tensor": lambda x: x[x > 0] * 2,
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0)[0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "_unique2": lambda x: torch.unique(x),
    "repeat_interleave.self_Tensor": lambda x: torch.repeat_interleave(x[0], (x[0] > 0).long()),
    "bincount": lambda x: torch.bincount(x.flatten().abs().long()),
    "item": lambda x: torch.zeros(x.abs().sum().long().item()),  # type: ignore[arg-type]  # a whole number
}
"""By the operator that makes the size."""


@pytest.mark.parametrize("dynamic", [None, {0: {0: "batch"}}], ids=["fixed", "free"])
@pytest.mark.parametrize("operator", SHAPES)
def test_an_output_of_such_a_shape_is_refused(operator: str, dynamic: dict[Any, Any] | None) -> None:
    with pytest.raises(UnsupportedError) as caught:
        go.capture(Net(SHAPES[operator]), (torch.randn(4, 3),), dynamic=dynamic)
    error = caught.value
    assert error.what == "the shape of output 'found' depends on the values of a tensor"
    assert error.where is not None and f"({operator}) in module 'head'\n{__file__}:" in error.where
    assert f"only once {operator} has run" in str(error.why) and "u0" in str(error.why)
    assert "torch.where(mask, x, 0)" in str(error.todo)


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found = x[x > 0]  # here
        return torch.relu(found).sqrt()


def test_the_line_of_the_operator_is_named_and_not_that_of_the_output() -> None:
    with pytest.raises(UnsupportedError) as caught:
        go.capture(Selects(), (torch.randn(4, 3),))
    assert str(caught.value.where).endswith("found = x[x > 0]  # here")


def test_a_number_that_was_computed_is_refused_as_an_output() -> None:
    with pytest.raises(UnsupportedError, match="the value of output 'found' depends") as caught:
        go.capture(Net(lambda x: x.sum().item()), (torch.randn(4, 3),))
    assert "(item) in module 'head'" in str(caught.value.where) and "return the tensor itself" in str(caught.value.todo)


@pytest.mark.parametrize("suffix", [".gopt", ".pt2"])
def test_such_sizes_inside_of_a_graph_are_carried(suffix: str, tmp_path: Path) -> None:
    net = Net(lambda x: x[x > 0].sum() * torch.nonzero(x > 1).sum() + x.max().item())
    model = go.capture(net, (torch.randn(4, 3),), dynamic={0: {0: "batch"}})
    result, _ = go.run(model, "exact")
    result.save(tmp_path / f"net{suffix}")
    again = go.load(tmp_path / f"net{suffix}")
    for size in (2, 7):
        x = torch.randn(size, 3)
        assert all(torch.allclose(each(x)["found"], net(x)["found"]) for each in (model, result, again))


def test_a_size_of_an_input_is_an_output_like_before() -> None:
    model = go.capture(Net(lambda x: x.shape[0]), (torch.randn(4, 3),), dynamic={0: {0: "batch"}})
    assert model(torch.randn(7, 3))["found"] == 7
