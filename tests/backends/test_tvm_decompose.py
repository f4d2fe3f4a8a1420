"""Operators that torch takes apart before they are compiled, and what is not sent through torch for that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.tvm.decompose import decomposed
from graphopt.printer import operator_name
from tests.compare import relative_error


class Calls(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.function(x))


def _model(function: object) -> tuple[go.Model, nn.Module]:
    net = Calls(function)
    return go.capture(net, (torch.randn(2, 3),), dynamic={"x": {0: "rows"}}), net


def _names(model: go.Model) -> set[str]:
    return {operator_name(node.target) for node in model.graph.nodes if node.op == "call_function"}


def test_a_model_that_converts_as_it_is_stays_itself() -> None:
    model, _ = _model(torch.tanh)
    assert decomposed(model) is model


def test_an_operator_without_a_converter_becomes_others_and_sizes_stay_free() -> None:
    model, net = _model(torch.frac)
    text = str(model)
    result = decomposed(model)
    assert str(model) == text
    assert "frac" in _names(model) and _names(result) == {"trunc", "sub.Tensor", "linear"}
    artifact = go.build(model, threads=1)
    for rows in (1, 5):
        x = 3 * torch.randn(rows, 3)
        with torch.no_grad():
            assert relative_error(artifact(x), net(x)) < 1e-6
            assert torch.equal(result(x), net(x))
