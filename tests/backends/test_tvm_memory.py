"""Weights side by side: the same numbers in other memory, and what shared memory still does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils import dlpack
from tvm import runtime

import graphopt as go
from graphopt.backends.tvm import memory
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.memory import move_together
from tests.compare import relative_error

TENSORS = [
    torch.arange(15.0).reshape(3, 5),
    torch.tensor(2.5),
    torch.tensor([True, False, True]),
    torch.arange(4.0).bfloat16(),
    torch.arange(7),
    torch.empty(0, 3),
]


def moved(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = [runtime.from_dlpack(tensor) for tensor in tensors]
    move_together(weights)
    return [dlpack.from_dlpack(weight) for weight in weights]


def test_every_type_keeps_its_numbers_in_memory_of_its_own() -> None:
    for before, after in zip(TENSORS, found := moved(TENSORS), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        assert not before.numel() or after.data_ptr() != before.data_ptr()
        assert after.data_ptr() % 64 == 0
    places = [tensor.data_ptr() for tensor in found if tensor.numel()]
    assert all(0 < later - earlier <= 64 for earlier, later in itertools.pairwise(places)), "in order, side by side"


def test_tied_weights_stay_one() -> None:
    tied = torch.arange(6.0)
    one, _, other = moved([tied, torch.zeros(3), tied])
    assert one.data_ptr() == other.data_ptr() != tied.data_ptr()
    assert torch.equal(one, tied)


def test_a_part_of_the_memory_of_another_is_whole() -> None:
    tensor = torch.arange(32.0)
    whole, part = moved([tensor, tensor[:16]])
    assert torch.equal(whole, tensor)
    assert torch.equal(part, tensor[:16])


def test_large_ones_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST", 100)
    tensor = torch.arange(32.0)
    assert moved([tensor])[0].data_ptr() == tensor.data_ptr()
    assert moved([]) == []


def test_a_compiled_model_reads_them_there_and_the_model_is_not_touched() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8)).eval()
    x = torch.randn(5, 64)
    expected = net(x)
    artifact = go.build(go.capture(net, (x,)), threads=1)
    assert isinstance(artifact, TvmArtifact)
    places = [dlpack.from_dlpack(weight).data_ptr() for weight in artifact.weights]
    assert max(places) - min(places) < sum(weight.nbytes for weight in net.parameters()) * 2
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    (found,) = artifact.run([x])
    assert relative_error(found, expected) < 1e-5
