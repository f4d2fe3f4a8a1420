"""Few channels on processors that compute a vector in two halves: what is packed, and that it is right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.target import Target, this_machine
from tests.compare import relative_error


def grouped(outputs: int = 32, groups: int = 4) -> nn.Module:
    return nn.Conv2d(32, outputs, 3, stride=2, padding=1, groups=groups).eval()


def flops(net: nn.Module, target: str) -> int:
    """Operations of the only kernel that multiplies, in code for a target that need not run here."""
    artifact = go.build(go.capture(net, (torch.randn(1, 32, 12, 12),)), target=target, threads=1)
    assert isinstance(artifact, TvmArtifact) and artifact.built is not None
    (found,) = (work.flops for work in artifact.built.work.values() if work.flops != 0)
    return int(found)


def test_groups_of_half_a_vector_are_not_widened_with_zeros() -> None:
    counted = 2 * 6 * 6 * 32 * 9 * 8
    assert flops(grouped(), "znver4") == counted
    assert flops(grouped(), "skylake-avx512") == 2 * counted  # two groups in a vector, half of the weights zero
    assert flops(grouped(), "x86-64-v3") == counted


def test_narrower_groups_are_widened_to_half_a_vector() -> None:
    counted = 2 * 6 * 6 * 32 * 9 * 4
    assert flops(grouped(groups=8), "znver4") == 2 * counted
    assert flops(grouped(groups=8), "skylake-avx512") == 4 * counted


NETS = {
    "groups of half a vector": grouped(),
    "narrower groups": grouped(groups=8),
    "a vector and a half": nn.Conv2d(32, 24, 3, stride=2, padding=1),
    "Winograd's": nn.Conv2d(32, 24, 3, padding=1),
    "a product": nn.Conv2d(32, 40, 1),
    "twelve channels": nn.Conv2d(32, 12, 2),
    "three channels": nn.Conv2d(32, 3, 3, padding=1),
    "expanded": nn.Sequential(nn.Conv2d(32, 24, 1), nn.ReLU6(), nn.Conv2d(24, 24, 3, padding=1, groups=24)),
}


@pytest.mark.skipif(
    not Target.parse("znver4").needs <= this_machine().needs, reason="this processor lacks what Zen 4 has"
)
@pytest.mark.parametrize("name", NETS)
def test_the_numbers_are_right(name: str) -> None:
    net, x = NETS[name].eval(), torch.randn(2, 32, 12, 13)
    model = go.capture(net, (x,))
    result = go.build(model, target="znver4", threads=1)(x)
    expected = copy.deepcopy(net).double()(x.double()).detach()
    assert relative_error(result.double(), expected) < (2e-5 if name == "Winograd's" else 2e-6)
