"""The small models of `gpu_checks`: compiled on one machine, their answers checked on another that has a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphopt as go
from benchmarks.gpu_checks import CHECKS, args_of

__all__ = ["ALLOWED", "build_checks", "run_checks"]

ALLOWED = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5}
"""Errors relative to the largest output of torch in float64."""


def build_checks(folder: Path, target: str, part: slice = slice(None)) -> None:
    """Write the artifact and the reference of every check that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dtype in _names()[part]:
        place = folder / f"{name}-{dtype}"
        if place.is_dir():
            continue
        make, shapes = CHECKS[name]
        kind = getattr(torch, dtype)
        net, args = make().eval().to(kind), args_of(shapes, kind)
        try:
            go.build(go.capture(net, args), target=target).save(place)
        except Exception as error:  # the other checks are still worth building
            print(f"{name} {dtype}: {type(error).__name__}: {str(error).strip()[-600:]}", file=sys.stderr)
            continue
        with torch.no_grad():
            exact = net.double()(*(arg.double() for arg in args))
        np.save(place / "reference.npy", exact.numpy())


def _names() -> list[tuple[str, str]]:
    """Every check in float16; those of products and attention in the other dtypes as well."""
    wanted = [(name, "float16") for name in CHECKS]
    wide = ("conv", "linear", "matmul", "self", "attention", "layer", "softmax", "max-pool", "residual")
    wanted += [(name, "float32") for name in CHECKS if name.startswith(wide)]
    narrow = ("conv-stem", "conv-3x3", "linear", "matmul", "self-attention", "attention-masked", "layer-norm")
    return wanted + [(name, "bfloat16") for name in narrow]


def run_checks(folder: Path) -> dict[str, Any]:
    """The error of every check, or what went wrong; a fault ends a process's use of the GPU, and another goes on."""
    found: dict[str, Any] = {}
    names = sorted(place.name for place in folder.iterdir())
    while len(found) < len(names):
        command = [sys.executable, "-m", "benchmarks.gpu_verify", str(folder), *names[len(found) :]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found.update({line.pop("name"): line for line in lines})
        if not lines:
            found[names[len(found)]] = {"right": False, "failure": done.stderr[-1500:]}
    return found


def _run(folder: Path, names: list[str]) -> None:
    """Print a line of JSON for every check, up to the first that raises."""
    for name in names:
        try:
            found = _checked(folder / name)
        except Exception:  # told to the process that waits for the line
            print(json.dumps({"name": name, "right": False, "failure": traceback.format_exc()[-1500:]}), flush=True)
            return
        print(json.dumps({"name": name, **found}), flush=True)


def _checked(place: Path) -> dict[str, Any]:
    from graphopt.backend import load_artifact

    name, _, dtype = place.name.rpartition("-")
    _, shapes = CHECKS[name]
    reference = torch.from_numpy(np.load(place / "reference.npy"))
    artifact = load_artifact(place)
    args = tuple(arg.cuda() for arg in args_of(shapes, getattr(torch, dtype)))
    results = [artifact(*args) for _ in range(3)]  # later calls replay what the first has captured
    errors = [_error(result, reference) for result in results]
    return {"error": max(errors), "right": max(errors) <= ALLOWED[dtype]}


def _error(result: Tensor, reference: Tensor) -> float:
    got = result.detach().double().cpu()
    if got.shape != reference.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


if __name__ == "__main__":
    _run(Path(sys.argv[1]), sys.argv[2:])
