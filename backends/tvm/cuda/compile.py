"""A model to an artifact for a GPU; needs nvcc, and no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import dlpack

from graphopt.backends.tvm.cuda.artifact import GpuArtifact, Weight
from graphopt.backends.tvm.cuda.converters import GPU_CONVERTERS
from graphopt.backends.tvm.cuda.gpu import Gpu
from graphopt.backends.tvm.cuda.lower import BuiltForGpu, build
from graphopt.backends.tvm.cuda.nvcc import machine_code
from graphopt.backends.tvm.cuda.target import gpu_target
from graphopt.backends.tvm.importer import import_model
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.backend import Unsupported
    from graphopt.model import Model

__all__ = ["compile_for_gpu", "generate"]

_NO_CPU = Machine(lanes=0, registers=0, l1=0, l2=0, threads=1, exact=True)
"""No vectors: the converters have nothing packed for a CPU's."""


def generate(model: Model, target: Target) -> tuple[BuiltForGpu | None, list[Unsupported]]:
    """The host's code and the kernels' source, or everything that cannot be converted.

    Raises:
        UnsupportedError: for an architecture that the kernels do not support.
    """
    compiled_for = gpu_target(target)
    imported = import_model(model, _NO_CPU, GPU_CONVERTERS)
    if imported.unsupported:
        return None, imported.unsupported
    return build(imported.module, compiled_for, Gpu.of(target)), []


def compile_for_gpu(model: Model, target: Target, built: BuiltForGpu) -> GpuArtifact:
    """The artifact of generated code.

    Raises:
        UnsupportedError: where nvcc is not installed.
    """
    code = machine_code(built.source, target.arch) if built.source else b""
    weights = [_weight(weight) for weight in built.weights]
    return GpuArtifact(model.signature, target, built.executable.jit, built.source, code, weights, built)


def _weight(value: Any) -> Weight:
    """A constant's bytes; through torch, because numpy does not know every dtype."""
    tensor = dlpack.from_dlpack(value).contiguous()
    data = tensor.flatten().view(torch.uint8).numpy()
    return str(value.dtype), tuple(int(size) for size in value.shape), data
