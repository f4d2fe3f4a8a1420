"""Models that are too large to be read whole: their weights stay on disk, and damage is noticed all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graphopt as go
from graphopt.tools import sources
from tests.tools.command import graphopt, refused


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "_LARGE", 1)
    net = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).eval()
    go.capture(net, (torch.randn(2, 24),)).save(tmp_path / "net.gopt")
    return tmp_path / "net.gopt"


def test_they_are_mapped_and_give_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.read_model(str(model)).params.mapped
    command = ("opt", model, "-p", "low-rank{params=0.7}", "-o")
    assert graphopt(*command, model.with_name("large.gopt")).exit_code == 0
    monkeypatch.setattr(sources, "_LARGE", 2**30)
    assert not sources.read_model(str(model)).params.mapped
    assert graphopt(*command, model.with_name("small.gopt")).exit_code == 0
    assert model.with_name("large.gopt").read_bytes() == model.with_name("small.gopt").read_bytes()


def test_a_model_may_be_written_over_itself(model: Path) -> None:
    expected = go.load(model)(torch.ones(2, 24))
    assert graphopt("opt", model, "-p", "dead-code", "-o", model).exit_code == 0
    assert torch.equal(go.load(model)(torch.ones(2, 24)), expected)


@pytest.mark.parametrize("place", [0.5, 0.999])
def test_damage_is_noticed(model: Path, place: float) -> None:
    data = bytearray(model.read_bytes())
    data[int(place * len(data))] ^= 64
    model.write_bytes(data)
    refused(graphopt("info", model), 2, str(model))


def test_a_file_that_is_cut_short_is_noticed(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:2000])
    refused(graphopt("info", model), 2, "is no .gopt model")
