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


def test_a_batch_norm_used_twice_counts_twice() -> None:
    class Siamese(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(y) * self.norm(z)

    net, inputs = Siamese().train(), tuple(torch.randn(3, 4) for _ in range(3))
    model = graphopt.capture(net, inputs)
    assert torch.equal(model(*inputs), net(*inputs))
    for name, tensor in net.state_dict().items():
        assert torch.equal(model.params[name], tensor), name
    assert model.params["norm.num_batches_tracked"] == 3
    model.eval()
    net.eval()
    assert torch.equal(model(*inputs), net(*inputs))
