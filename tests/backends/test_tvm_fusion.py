"""Fused functions that were once wrong, or compiled for minutes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from tests.compare import relative_error


class Net(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def compiled(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    result = go.build(go.capture(Net(function), (x,)), backend="tvm", threads=1)(x)
    assert isinstance(result, Tensor)
    return result


NESTED: dict[str, Callable[..., Tensor]] = {
    "tanh of sigmoid": lambda x: torch.tanh(torch.sigmoid(x)),
    "a gated cell": lambda x: torch.sigmoid(x) * torch.tanh(torch.sigmoid(x) * x + torch.sigmoid(x) * torch.tanh(x)),
    "four levels": lambda x: torch.erf(torch.tanh(x * torch.sigmoid(torch.sigmoid(x)))),
    "mish": nn.functional.mish,
}


@pytest.mark.parametrize("name", NESTED)
def test_elementary_functions_of_one_another(name: str) -> None:
    x = torch.randn(3, 19) * 3
    assert relative_error(compiled(NESTED[name], x), NESTED[name](x)) < 1e-6


def test_no_elements_in_the_middle() -> None:
    def function(x: Tensor) -> Tensor:
        return (x[:, 0:0] + 1) * x[:, 0:0].sin()

    assert compiled(function, torch.randn(2, 3, 5)).shape == (2, 0, 5)


def test_an_independent_sum_before_a_resized_image() -> None:
    conv, scale = nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2)

    def function(x: Tensor) -> Tensor:
        return (conv(x) + x * 2) + scale(conv(x)[:, :, ::2, ::2])

    x = torch.randn(1, 8, 6, 6)
    assert relative_error(compiled(function, x), function(x)) < 1e-6


def test_a_gate_repeated_over_an_image() -> None:
    squeeze, excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def function(x: Tensor) -> Tensor:
        return x * torch.sigmoid(excite(torch.relu(squeeze(x.mean((2, 3), keepdim=True)))))

    x = torch.randn(2, 16, 7, 7)
    assert relative_error(compiled(function, x), function(x)) < 1e-6


def test_a_tensor_concatenated_with_itself() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cat([x, x + 1, x], 1).relu()

    x = torch.randn(2, 8, 3, 3)
    assert relative_error(compiled(function, x), function(x)) < 1e-6
