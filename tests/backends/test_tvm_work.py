"""Operations and bytes of compiled functions, fixed sizes and free ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.profile import RUNTIME, Kernel, profile


def kernels(net: nn.Module, *args: Tensor, run_on: Tensor | None = None, **options: object) -> dict[str, Kernel]:
    artifact = go.build(go.capture(net.eval(), args, **options), threads=1)
    assert isinstance(artifact, TvmArtifact)
    inputs = list(args) if run_on is None else [run_on]
    found = profile(artifact, inputs, rounds=2, warmup=1).kernels
    artifact.run(inputs)  # it runs as before when nobody watches
    return {kernel.name: kernel for kernel in found if kernel.name != RUNTIME}


def one(found: dict[str, Kernel], word: str) -> Kernel:
    (kernel,) = (kernel for name, kernel in found.items() if word in name)
    return kernel


def test_a_linear_layer() -> None:
    # 64 outputs fill the vectors of every x86: a weight is padded to whole ones, and the padding is read as well.
    kernel = one(kernels(nn.Linear(32, 64), torch.randn(5, 32)), "linear")
    assert kernel.flops == 2 * 5 * 32 * 64
    assert kernel.bytes == 4 * (5 * 32 + 32 * 64 + 64 + 5 * 64)
    assert kernel.calls == 1 and kernel.seconds > 0


def test_free_sizes_are_those_of_the_call() -> None:
    net, batch = nn.Linear(32, 64), {0: {0: "batch"}}
    kernel = one(kernels(net, torch.randn(5, 32), run_on=torch.randn(7, 32), dynamic=batch), "linear")
    assert kernel.flops == 2 * 7 * 32 * 64
    assert kernel.bytes == 4 * (7 * 32 + 32 * 64 + 64 + 7 * 64)


def test_winograd_counts_its_own_products() -> None:
    kernel = one(kernels(nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 28, 28)), "winograd")
    assert kernel.flops == 2 * 36 * 7 * 7 * 64 * 64


def test_strassen_counts_seven_products_of_eight() -> None:
    kernel = one(kernels(nn.Linear(768, 1536), torch.randn(196, 768)), "strassen")
    assert kernel.flops == 2 * 196 * 768 * 1536 * 7 // 8


def test_a_look_up_reads_few_rows() -> None:
    (kernel,) = kernels(nn.Embedding(1000, 16), torch.tensor([1, 2])).values()
    assert kernel.flops == 0
    assert kernel.bytes == 4 * 2 * 16 + 8 * 2 + 4 * 2 * 16
