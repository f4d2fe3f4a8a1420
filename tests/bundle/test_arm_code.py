"""The code of convolutions, products and attention for ARM is made of vector instructions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from benchmarks.arm_code import OBJDUMP, Instruction, hot_loops, kind_of, loops_of, mix
from graphopt.backends.tvm import TvmArtifact
from graphopt.backends.tvm.bundle import toolchain
from graphopt.errors import UsageError
from graphopt.target import Target


def net() -> go.Model:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Hardswish()]
    layers += [nn.Conv2d(32, 48, 1), nn.SiLU(), nn.Conv2d(48, 48, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return go.capture(nn.Sequential(*layers, nn.Linear(48, 10)).eval(), (torch.randn(1, 3, 32, 32),))


@pytest.mark.parametrize("target", ["cortex-a53", "cortex-a72", "neoverse-n1", "apple-m1", "armv7", "cortex-a15"])
def test_hot_loops_are_of_vectors(target: str, tmp_path: Path) -> None:
    machine = Target.parse(target)
    if shutil.which(OBJDUMP[machine.arch]) is None:
        pytest.skip(f"{OBJDUMP[machine.arch]} is not installed")
    artifact = go.build(net(), target, threads=2)
    assert isinstance(artifact, TvmArtifact) and artifact.built is not None
    assert artifact.coverage.general == ()
    toolchain.link(artifact.built.executable, tmp_path / "model.so", machine.arch)
    loops = hot_loops(tmp_path / "model.so", machine.arch)
    if target == "armv7":  # processors without a fused one are better off with two instructions, LLVM says
        assert not loops
        return
    counts = mix(loops)
    assert counts["vector"] > 400 and counts["scalar"] == 0
    # Those of Winograd's transforms, of 36 vectors; the loops of products and convolutions have next to none.
    assert counts["spill"] < 0.2 * counts["vector"]


def test_riscv_code_is_made() -> None:
    artifact = go.build(net(), "riscv64", threads=1)
    assert isinstance(artifact, TvmArtifact) and artifact.built is not None and artifact.coverage.general == ()
    with pytest.raises(UsageError, match="this artifact is code for riscv64 generic-rv64"):
        artifact(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("fmla v0.4s, v1.4s, v2.s[0]", "vector"),
        ("vfma.f32 q8, q9, q10", "vector"),
        ("fmadd s0, s1, s2, s3", "scalar"),
        ("fmul s0, s1, s2", "scalar"),
        ("fmul v0.4s, v1.4s, v2.4s", "separate"),
        ("str q0, [sp, #16]", "spill"),
        ("str q0, [x1, #16]", None),
        ("ldr x0, [sp]", None),
    ],
)
def test_kinds_of_instructions(text: str, kind: str | None) -> None:
    name, _, operands = text.partition(" ")
    assert kind_of(Instruction(0, name, operands)) == kind


def test_inner_loops_alone_are_found() -> None:
    rows = [
        ("mov", "x0, 1"),
        ("fmla", "v0.4s, v1.4s, v2.4s"),
        ("b.ne", "4"),
        ("nop", ""),
        ("cbnz", "x0, 0"),
        ("b", "18"),
    ]
    code = [Instruction(4 * at, name, operands) for at, (name, operands) in enumerate(rows)]
    (loop,) = loops_of("f", code)
    assert [i.address for i in loop.body] == [4, 8] and loop.assembler == "fmla v0.4s, v1.4s, v2.4s"
