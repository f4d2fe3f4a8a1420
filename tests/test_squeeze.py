"""A squeezed axis of free size: of size one it would go, of any other it stays, and a graph can do one of the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import InputError


class Net(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.sin())


SQUEEZES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "all": (lambda x: x.squeeze(), ("batch != 1",)),
    "a free axis": (lambda x: x.squeeze(0), ("batch != 1",)),
    "a free axis from the end": (lambda x: x.squeeze(-3).cos(), ("batch != 1",)),
    "several": (lambda x: x.squeeze((0, 1)), ("batch != 1",)),
    "in place": (lambda x: x.squeeze_(0), ("batch != 1",)),
    "twice": (lambda x: x.squeeze(0).cos().squeeze(0), ("batch != 1",)),
    "an axis of size one": (lambda x: x.squeeze(1), ()),
    "an axis of size three": (lambda x: x.squeeze(2), ()),
    "no axis": (lambda x: x.squeeze(()), ()),
    "an even size": (lambda x: torch.cat([x, x]).squeeze(0), ()),
    "a lone number": (lambda x: x * x.sum().squeeze(0).squeeze(), ()),
}


@pytest.mark.parametrize("example", [4, 1])
@pytest.mark.parametrize("name", SQUEEZES)
def test_a_size_of_one_is_answered_rightly_or_refused(name: str, example: int) -> None:
    step, conditions = SQUEEZES[name]
    net = Net(step)
    model = go.capture(net, (torch.randn(example, 1, 3),), dynamic={0: {0: "batch"}})
    assert model.signature.conditions == conditions
    rank = len(model.signature.tensor_outputs[0].dims)
    for size in (0, 1, 2, 5):
        x = torch.randn(size, 1, 3)
        if conditions and size == 1:
            with pytest.raises(InputError, match="captured for sizes with batch != 1, the inputs have batch=1"):
                model(x)
            continue
        assert torch.equal(model(x), net(x)) and net(x).ndim == rank


def test_a_size_that_is_computed_is_held_too() -> None:
    net = Net(lambda x: x[1:].squeeze(0))
    model = go.capture(net, (torch.randn(5, 1, 3),), dynamic={0: {0: "batch"}})
    assert torch.equal(model(x := torch.randn(1, 1, 3)), net(x)) and torch.equal(
        model(x := torch.randn(7, 1, 3)), net(x)
    )
    with pytest.raises(InputError, match="the inputs have batch=2"):
        model(torch.randn(2, 1, 3))


def test_a_range_without_one_needs_no_condition() -> None:
    model = go.capture(
        Net(lambda x: x.squeeze()), (torch.randn(5, 1, 3),), dynamic={0: {0: torch.export.Dim("n", min=3)}}
    )
    assert not model.signature.conditions and model.signature.ranges["n"].min == 3


def test_files_passes_and_backends_hold_the_condition(tmp_path: Path) -> None:
    model = go.capture(Net(lambda x: x.squeeze(0)), (torch.randn(5, 1, 3),), dynamic={0: {0: "batch"}})
    model.save(tmp_path / "net.gopt")
    model.save(tmp_path / "net.pt2")
    result, _ = go.run(model, "exact")
    holders: list[Any] = [result, go.load(tmp_path / "net.gopt"), go.load(tmp_path / "net.pt2")]
    for each in (*holders, go.build(model, backend="reference")):
        assert each(torch.randn(3, 1, 3)).shape == (3, 1, 3)
        with pytest.raises(InputError, match="!= 1"):
            each(torch.randn(1, 1, 3))
