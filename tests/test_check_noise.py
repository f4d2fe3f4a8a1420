"""The numeric check excuses what rounding alone would do to a net, and nothing more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.check import Oracle
from graphopt.errors import CheckFailed
from graphopt.transform import Contract


class _Amplifier(nn.Module):
    """A difference of near equals: rounding of the weight moves the output by about 1e-4 of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64) + 1)
        self.other = nn.Parameter(self.weight.detach() * 1.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight - x * self.other, (x > 0.5).sum()


def _scaled(model: go.Model, factor: float) -> go.Model:
    other = model.clone()
    other.params.set("weight", model.params["weight"].detach() * factor)
    return other


def test_what_rounding_alone_does_is_no_failure_of_a_pass() -> None:
    model = go.capture(_Amplifier().eval(), (torch.rand(8, 64),))
    oracle = Oracle(model)
    assert 1e-5 < oracle.noise[0] < 1e-3 and oracle.noise[1] == 0
    check = oracle.judge(_scaled(model, 1 + 1.2e-7), Contract.EXACT)
    assert 1e-5 < check.error <= check.limit < 1e-2


def test_a_change_of_one_percent_is_a_failure_even_of_a_noisy_net() -> None:
    model = go.capture(_Amplifier().eval(), (torch.rand(8, 64),))
    with pytest.raises(CheckFailed, match="exact allows"):
        Oracle(model).judge(_scaled(model, 1.01), Contract.EXACT)


def test_a_quiet_net_is_held_to_the_plain_limit() -> None:
    model = go.capture(nn.Linear(64, 8).eval(), (torch.rand(8, 64),))
    oracle = Oracle(model)
    with pytest.raises(CheckFailed, match="allows 1e-05"):
        oracle.judge(_scaled(model, 1.001), Contract.EXACT)


def test_an_output_that_is_nothing_but_rounding_is_excused_and_the_others_are_not() -> None:
    class Residue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64) + 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * self.weight
            return (y + y * 0.7) - y * 1.7, y

    model = go.capture(Residue().eval(), (torch.rand(8, 64),))
    oracle = Oracle(model)
    assert oracle.judge(_scaled(model, 1 + 1.2e-7), Contract.EXACT).limit > 1e-2
    with pytest.raises(CheckFailed, match="allows 1e-05"):
        oracle.judge(_scaled(model, 1.01), Contract.EXACT)
