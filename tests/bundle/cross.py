"""Running bundles: here, or for another architecture in qemu's user mode."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt as go
from graphopt.backends.tvm.bundle import toolchain, wheels
from graphopt.errors import GraphoptError
from graphopt.target import Target, why_not_here
from tests.compare import relative_error

QEMU = {
    "aarch64": ("qemu-aarch64-static", "/usr/aarch64-linux-gnu"),
    "armv7": ("qemu-arm-static", "/usr/arm-linux-gnueabihf"),
}
SECONDS = 300


def emulator(arch: str) -> list[str]:
    """The words before a program of another architecture; skips the test where they, or a compiler, are missing."""
    program, root = QEMU[arch]
    if shutil.which(program) is None or not Path(root).is_dir():
        pytest.skip(f"{program} and {root} are not both installed: code for {arch} cannot run here")
    try:
        toolchain.compiler(arch)
    except GraphoptError as error:
        pytest.skip(str(error))
    return [program, "-L", root]


def require_runtime(arch: str) -> None:
    """Have TVM's runtime for an architecture fetched; the test is skipped where downloads are forbidden."""
    if os.environ.get("GRAPHOPT_OFFLINE", "0") in ("", "0"):
        wheels.fetch(arch)
        return
    try:
        wheels.libraries(arch)
    except GraphoptError as error:
        pytest.skip(str(error))


def words_for(target: str, *more: str) -> list[str]:
    """What to put before a program for a target; the test is skipped where it cannot run."""
    machine = Target.parse(target)
    reason = why_not_here(machine)
    if reason is None:
        return []
    if machine.arch == Target.parse("cpu").arch:
        pytest.skip(f"code for {target} cannot run here: {reason}")
    words = emulator(machine.arch)
    require_runtime(machine.arch)
    return [words[0], *more, *words[1:]]


def run_program(words: list[str], bundle: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """`graphopt_run` of a bundle, in an empty environment and another folder."""
    command = [*words, str(bundle / "graphopt_run"), str(bundle), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd="/", env={})


def outputs_of(words: list[str], bundle: Path, inputs: Mapping[str, torch.Tensor], work: Path) -> list[torch.Tensor]:
    """The outputs of a bundle that is run by its own program, in the order of its signature."""
    options: list[object] = []
    for number, (name, tensor) in enumerate(inputs.items()):
        np.save(work / f"input_{number}.npy", tensor.numpy())
        options += ["--input", f"{name}={work / f'input_{number}.npy'}"]
    out = work / "results"
    shutil.rmtree(out, ignore_errors=True)
    done = run_program(words, bundle, *options, "-o", out)
    assert done.returncode == 0, done.stderr
    names = [line.split()[1].rstrip(":") for line in run_program(words, bundle).stdout.splitlines() if "output" in line]
    return [torch.from_numpy(np.load(out / f"{name}.npy")) for name in names]


def error_of(model: go.Model, target: str, inputs: list[torch.Tensor], work: Path, threads: int = 2) -> float:
    """Build a model for a target, copy the bundle to a fresh folder, run it there and compare it with PyTorch."""
    words = words_for(target)
    go.build(model, target, threads=threads).save(work / "built")
    shutil.move(work / "built", work / "fresh")
    named = dict(zip((spec.name for spec in model.signature.tensor_inputs), inputs, strict=True))
    with torch.no_grad():
        expected = model.call_flat(inputs)
    return relative_error(outputs_of(words, work / "fresh", named, work), expected)
