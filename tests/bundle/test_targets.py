"""Small nets compiled for every CPU preset, run by the bundle's own program: here, or in qemu's user mode."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backend import load_artifact
from graphopt.errors import LoadError
from graphopt.manifest import read_manifest, write_manifest
from graphopt.target import Target
from tests.bundle.cross import error_of, outputs_of, run_program, words_for
from tests.compare import relative_error

LIMIT = 1e-4
WITH_WHEELS = [name for name in Target.names() if Target.parse(name).arch in ("x86_64", "aarch64")]


class Net(nn.Module):
    """A bit of everything: convolutions of four kinds, attention, elementary functions, a sort, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.Hardswish())
        self.depthwise = nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.square = nn.Conv2d(32, 32, 3, padding=1)
        self.narrow = nn.Conv2d(32, 20, 1)
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 7)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(image)
        x = self.narrow(self.square(self.depthwise(x)).sigmoid())
        x = x.flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        scores = self.head(nn.functional.gelu(x)).softmax(-1).mean(1)
        return scores, scores.topk(3).indices


@cache
def captured() -> go.Model:
    torch.manual_seed(0)
    model = go.capture(Net().eval(), (torch.randn(2, 3, 16, 16),), dynamic={"image": {0: "batch"}})
    return go.run(model, "exact")[0]


def net_and_input(batch: int = 2) -> tuple[go.Model, Tensor]:
    return captured(), torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("target", WITH_WHEELS)
def test_a_net_on_every_preset(target: str, tmp_path: Path) -> None:
    model, x = net_and_input(3)
    assert error_of(model, target, [x], tmp_path) < LIMIT


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_on_arm(threads: int, tmp_path: Path) -> None:
    """More threads than this machine may have, and none besides the caller."""
    model, x = net_and_input()
    assert error_of(model, "arm64", [x], tmp_path, threads) < LIMIT
    assert read_manifest(tmp_path / "fresh")["threads"] == threads


def test_exact_code_on_arm(tmp_path: Path) -> None:
    words = words_for("cortex-a72")
    model, x = net_and_input()
    go.build(model, "cortex-a72", exact_float=True).save(tmp_path / "bundle")
    with torch.no_grad():
        expected = model.call_flat([x])
    assert relative_error(outputs_of(words, tmp_path / "bundle", {"image": x}, tmp_path), expected) < 1e-5


def test_processors_that_are_too_old_are_refused(tmp_path: Path) -> None:
    """Neoverse N1 has what Cortex-A53 lacks, and not the other way round."""
    model, _ = net_and_input()
    old = words_for("neoverse-n1", "-cpu", "cortex-a53")
    go.build(model, "neoverse-n1", threads=1).save(tmp_path / "new")
    refused = run_program(old, tmp_path / "new")
    assert refused.returncode == 2 and refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert "is code for aarch64 neoverse-n1 and may use asimddp, asimdhp" in line and "does not have" in line
    go.build(model, "cortex-a53", threads=1).save(tmp_path / "old")
    assert run_program(old, tmp_path / "old").returncode == 0
    assert run_program(words_for("neoverse-n1", "-cpu", "neoverse-n1"), tmp_path / "new").returncode == 0


@pytest.mark.parametrize("change", ["dtype", "shape", "count"])
def test_weights_of_another_code_are_refused_before_anything_runs(change: str, tmp_path: Path) -> None:
    """By a manifest that was sealed again; the file of weights is as long as it says."""
    model, _ = net_and_input()
    go.build(model, "cpu", threads=1).save(tmp_path / "bundle")
    well = run_program([], tmp_path / "bundle")
    assert well.returncode == 0 and well.stderr == ""
    manifest = read_manifest(tmp_path / "bundle")
    first, second = manifest["weights"][:2]
    if change == "dtype":
        first["dtype"] = "int32"
    elif change == "shape":
        first["shape"] = [*first["shape"], 1]
    else:
        size = int(torch.Size(second["shape"]).numel()) + (second["offset"] - first["offset"]) // 4
        manifest["weights"][:2] = [first | {"shape": [size]}]
    write_manifest(tmp_path / "bundle", manifest)
    refused = run_program([], tmp_path / "bundle")
    assert refused.returncode == 2 and refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert "has a damaged manifest: its weights are not those of the code (" in line
    with pytest.raises(LoadError, match="the weights are not those that the code is for"):
        load_artifact(tmp_path / "bundle")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    model, _ = net_and_input()
    words = words_for("arm64")
    for target, name in (("cpu", "here"), ("arm64", "there")):
        go.build(model, target, threads=1).save(tmp_path / name)
    for program, bundle, text in (
        ([*words, str(tmp_path / "there/graphopt_run")], "here", ", this machine is aarch64"),
        ([str(tmp_path / "here/graphopt_run")], "there", "is code for aarch64 generic, this machine is x86_64"),
    ):
        refused = subprocess.run([*program, str(tmp_path / bundle)], capture_output=True, text=True, check=False)
        assert refused.returncode == 2 and refused.stdout == ""
        (line,) = refused.stderr.splitlines()
        assert text in line
    with pytest.raises(LoadError, match="is code for aarch64 generic, which this machine cannot run"):
        load_artifact(tmp_path / "there")
