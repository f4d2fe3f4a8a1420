"""How much of a layer's error arrives at the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._rank_influence import Influence
from graphopt.passes._rank_options import Option, Problems
from graphopt.rewriter import Rewriter

MATRIX = Folded("linear", matrix=True)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.9])
def test_a_layer_is_not_judged_by_rounding(part: float) -> None:
    """A weight of rank 3: ranks 3 to 6 lose nothing but rounding, of which nothing may arrive. Ranks 1 and 2 tell."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(16, 3) @ torch.randn(3, 16))
        net[1].weight.copy_(torch.eye(16))
    x = torch.randn(64, 16)
    model = go.capture(net.eval(), (x,))
    layers = [whole for _, whole in find_layers(Rewriter(model)) if isinstance(whole, Whole)]
    (problem,) = Problems(model, [(x,)], "activation", {}, 0).of(layers[:1])
    ranks = [(rank,) for rank in range(1, 7)]
    options = [Option("layer", None, (), 0.0, 256.0)]
    options += [
        Option("layer", MATRIX, rank, max(error, 0.0) / problem.energy, 32.0 * rank[0])
        for rank, error in zip(ranks, MATRIX.errors(problem, ranks), strict=True)
    ]
    assert options[2].error > 1e-4 and all(option.error < 1e-10 for option in options[3:])
    # What the layer makes is what the model makes, but for biases: nearly all of an error arrives.
    assert 0.5 < Influence(model, [(x,)]).of(problem, options, part) < 2


def test_a_layer_that_loses_nothing_counts_once() -> None:
    torch.manual_seed(0)
    model = go.capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(9, 4),))
    ((_, whole),) = find_layers(Rewriter(model))
    assert isinstance(whole, Whole)
    (problem,) = Problems(model, [(torch.randn(9, 4),)], "activation", {}, 0).of([whole])
    assert Influence(model, [(torch.randn(9, 4),)]).of(problem, [Option("layer", None, (), 0.0, 16.0)], 0.5) == 1.0
