"""Switching a model between training and evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.verify import verify
from tests.compare import relative_error


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3)], ids=["batch", "instance"]
)
def test_a_norm_without_running_statistics_is_the_same_in_both_modes(layer: nn.Module, first: str) -> None:
    x = torch.rand(4, 3, 5, 5)
    model = graphopt.capture(layer.train(first == "train"), (x,))
    for switch in (model.eval, model.train, model.eval):
        switch()
        verify(model)
        assert relative_error(model(x), layer(x)) < 1e-6
