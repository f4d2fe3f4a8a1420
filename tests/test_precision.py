"""Comparisons are made in whole float32, whatever the user has allowed torch to shorten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.check import Oracle, relative_error
from graphopt.precision import full_precision


@pytest.fixture
def medium() -> Iterator[None]:
    """Products in bfloat16, where the processor has it."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def found() -> list[str]:
    backends = torch.backends
    return [
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    ]


@pytest.mark.usefixtures("medium")
def test_products_are_whole_within_and_what_they_were_afterwards() -> None:
    before = found()
    assert before[0] == "tf32" and before[2] == "bf16"
    x, y = torch.randn(300, 300), torch.randn(300, 300)
    with full_precision():
        assert found() == ["ieee"] * 3
        assert relative_error(x @ y, (x.double() @ y.double()).float()) < 1e-6
    assert found() == before
    with pytest.raises(ZeroDivisionError), full_precision():
        _ = 1 / 0
    assert found() == before


class _Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x


@pytest.mark.usefixtures("medium")
def test_the_numeric_check_sees_whole_products() -> None:
    model = go.capture(_Product().eval(), (torch.randn(300, 300),))
    oracle = Oracle(model)
    (x,) = oracle.inputs[0]
    assert relative_error(oracle.reference[0][0], (x.double() @ x.double()).float()) < 1e-6
