"""The first half of the GPU benchmark: artifacts, references and statistics in a folder, made without a GPU."""

from __future__ import annotations

import copy
import json
import lzma
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt as go
from benchmarks.gpu_models import Case, buffers_of, inputs, make, with_buffers
from benchmarks.lively import calibrate
from benchmarks.machine import commit, versions
from graphopt.manifest import digest

__all__ = ["CASES", "TARGET", "build"]

TARGET = "cuda-sm_90"
CASES = (
    *(Case(model, "float16", 1) for model in ("resnet18", "mobilenet_v2", "deit_tiny", "minilm_128")),
    *(Case(model, "float16", 32) for model in ("resnet18", "mobilenet_v2", "deit_tiny", "minilm_128")),
    *(Case(model, "float32", 1) for model in ("resnet18", "mobilenet_v2", "deit_tiny", "minilm_128")),
    Case("deit_tiny", "bfloat16", 1),
)
"""The most telling ones first: time may run out there."""

CALIBRATION_BATCH = 4


def build(folder: Path, cases: Iterable[Case] = CASES, target: str = TARGET) -> None:
    """Write everything that the other half needs; artifacts that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for case in cases:
        start = time.perf_counter()
        net = _statistics(folder, case.model)
        if not (folder / case.name / "manifest.json").is_file():
            _artifact(folder, case, net, target)
        _reference(folder, case, net)
        done.append(vars(case))
        print(f"{case.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    made = {"cases": done, "target": target, "commit": commit(), "versions": versions("apache-tvm", "apache-tvm-ffi")}
    (folder / "cases.json").write_text(json.dumps(made, indent=1), encoding="utf-8")


def _statistics(folder: Path, name: str) -> nn.Module:
    """The model with calibrated batch norms, whose statistics are written once."""
    net = make(name)
    path = folder / f"{name}.npz"
    if not path.is_file():
        with torch.no_grad():
            calibrate(net, [inputs(Case(name, "float32", CALIBRATION_BATCH))])
        np.savez(path, **buffers_of(net))
    return with_buffers(net, np.load(path))


def _artifact(folder: Path, case: Case, net: nn.Module, target: str) -> None:
    with torch.no_grad():
        model = go.capture(_in(net, case), inputs(case))
        model, _ = go.run(model, "exact", check=False)  # what comes out is checked, against float64
    artifact = go.build(model, target=target)
    artifact.save(folder / case.name)
    (folder / case.name / "coverage.json").write_text(json.dumps(artifact.coverage.to_json()), encoding="utf-8")
    _share_weights(folder, case)


def _share_weights(folder: Path, case: Case) -> None:
    """Move the weights to a compressed file named after their digest: two batch sizes have the same."""
    path = folder / case.name / "weights.bin"
    shared = folder / "weights" / f"{digest(path)}.xz"
    shared.parent.mkdir(exist_ok=True)
    if not shared.is_file():
        with lzma.open(shared, "wb", preset=3) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file)
    path.unlink()


def _reference(folder: Path, case: Case, net: nn.Module) -> None:
    """Outputs in float64 for the first and the last sample, of weights and inputs rounded to the case's dtype."""
    path = folder / f"{case.name}.npy"
    if path.is_file():
        return
    chosen = sorted({0, case.batch - 1})
    args = tuple(arg[chosen] for arg in inputs(case))
    exact = _in(net, case).double()
    with torch.no_grad():
        result: Any = exact(*(arg.double() if arg.is_floating_point() else arg for arg in args))
    np.save(path, result.numpy().astype(np.float32))


def _in(net: nn.Module, case: Case) -> nn.Module:
    """A copy of the model in the case's dtype."""
    return copy.deepcopy(net).to(case.torch_dtype)
