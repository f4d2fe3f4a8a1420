"""Other software to measure against that is no backend of graphopt, used where it is installed. Imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.model import Model
from graphopt.signature import TensorSpec

__all__ = ["RIVALS", "Run", "is_installed", "prepare"]

Run = Callable[[list[Any]], list[Any]]
"""From flat input tensors to flat output tensors."""


def is_installed(name: str) -> bool:
    """Whether the package that a rival comes with can be imported."""
    return find_spec(RIVALS[name][0]) is not None


def prepare(name: str, model: Model, threads: int) -> Run:
    """Make the model ready to run there; what is compiled at the first call is not compiled yet."""
    return RIVALS[name][1](model, threads)


def _inductor(model: Model, threads: int) -> Run:
    compiled = torch.compile(model.module, dynamic=False)

    def run(tensors: list[Any]) -> list[Any]:
        flat = iter(tensors)
        leaves = [next(flat) if isinstance(spec, TensorSpec) else spec.value for spec in model.signature.inputs]
        args, kwargs = pytree.tree_unflatten(leaves, model.in_spec)
        torch.set_num_threads(threads)
        with torch.no_grad():
            results = pytree.tree_leaves(compiled(*args, **kwargs))
        return [result for result in results if isinstance(result, torch.Tensor)]

    return run


def _openvino(model: Model, threads: int) -> Run:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", options)
    request = compiled.create_infer_request()

    def run(tensors: list[Any]) -> list[Any]:
        found = request.infer([tensor.numpy() for tensor in tensors], share_inputs=True)
        return [torch.from_numpy(found[output]) for output in compiled.outputs]

    return run


RIVALS: dict[str, tuple[str, Callable[[Model, int], Run]]] = {
    "inductor": ("torch._inductor", _inductor),
    "openvino": ("openvino", _openvino),
}
"""Name -> the module it needs, and how it is made ready. Precision is float32 throughout."""
