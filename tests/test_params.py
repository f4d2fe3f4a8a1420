"""The table of tensors: frozen parameters stay frozen, ties stay ties."""

from __future__ import annotations

import torch
from torch import nn

import graphopt as go
from graphopt.params import ParamKind, ParamTable
from graphopt.rewriter import Rewriter
from graphopt.verify import verify


class _TwoBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(3))
        self.register_buffer("b", self.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.a).relu() * self.b


def test_frozen_parameters_stay_frozen_through_capture_and_clone() -> None:
    net = nn.Linear(3, 3)
    net.weight.requires_grad_(False)
    model = go.capture(net, (torch.randn(2, 3),))
    for each in (model, model.clone(), model.clone(share_tensors=True)):
        assert {name: p.requires_grad for name, p in each.named_parameters()} == {"weight": False, "bias": True}


def test_tied_buffers_stay_tied_through_clone() -> None:
    model = go.capture(_TwoBuffers().eval(), (torch.randn(2, 3),))
    for each in (model.clone(), model.clone(share_tensors=True)):
        verify(each)
        assert len(each.params.ties()) == len(model.params.ties())


def test_aliases_follow_every_change() -> None:
    model = go.capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    table: ParamTable = model.params
    table.add("other.weight", table["weight"], ParamKind.PARAMETER)
    assert table.aliases("weight") == {"weight", "other.weight"}
    table.set("weight", torch.zeros(3, 3))
    assert table.aliases("other.weight") == {"weight", "other.weight"}
    table.add("third.weight", torch.zeros(3, 3), ParamKind.PARAMETER)
    assert table.aliases("third.weight") == {"third.weight"}
    table.remove("other.weight")
    assert table.aliases("weight") == {"weight"}


def test_aliases_see_a_tie_made_from_outside_once_a_rewriter_starts() -> None:
    model = go.capture(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), (torch.randn(2, 3),))
    assert model.params.aliases("0.weight") == {"0.weight"}
    model.module.get_submodule("0").weight = model.params["1.weight"]
    Rewriter(model)
    assert model.params.aliases("1.weight") == {"0.weight", "1.weight"}
