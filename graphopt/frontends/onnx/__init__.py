"""ONNX models in: executed node by node with torch functions, under `torch.export`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from graphopt.model import Model

__all__ = ["load_onnx"]


def load_onnx(
    path: str | os.PathLike[str],
    *,
    constants: Mapping[str, np.ndarray[Any, Any]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Model:
    """Read an ONNX model as a trainable one; parameters, buffers, inputs and outputs keep their ONNX names.

    Args:
        constants: inputs to fix at these values, such as the shape that a Reshape takes.
        sizes: dynamic dims to fix at these sizes. The others stay dynamic under the names they have in the file, or
            under `INPUT_AXIS`; one that the graph itself fixes becomes fixed with a warning.

    Raises:
        LoadError: the file is missing, damaged, or refers to data outside its folder.
        UnsupportedError: an operator, opset, type or shape computation that is not handled, with the node's name.
        UsageError: `constants` or `sizes` name something that the model does not have.
    """
    from graphopt.errors import UnsupportedError
    from graphopt.frontends.onnx.dtypes import from_numpy
    from graphopt.frontends.onnx.module import OnnxModule
    from graphopt.frontends.onnx.reader import read_file
    from graphopt.frontends.onnx.sizes import name_dims, relax, run_once
    from graphopt.frontends.torch import capture

    fixed = dict(sizes or {})
    graph = read_file(path, {name: from_numpy(array) for name, array in (constants or {}).items()})
    module = OnnxModule(graph).eval()
    names = name_dims(graph, fixed)
    inputs = run_once(module, graph, names, fixed)
    free: list[dict[int, Any]] = [{axis: name for axis, name in axes.items() if name not in fixed} for axes in names]
    ports: dict[str, Any] = {"input_names": [s.name for s in graph.inputs], "output_names": list(graph.outputs)}
    if not any(axis > 1 for axes in free for axis in axes):  # sizes of images are never free of conditions
        try:
            return _without_unused(capture(module, inputs, dynamic=_given(free), **ports))
        except UnsupportedError:
            if not any(free):
                raise
    relaxed, frozen = relax(module, inputs, names, fixed)
    if frozen:
        warnings.warn(
            f"{graph.source}: the graph fixes the dynamic dims {', '.join(frozen)}; they are fixed now", stacklevel=2
        )
    return _without_unused(capture(module, inputs, dynamic=_given(relaxed), **ports))


def _given(dims: Sequence[Mapping[int, Any]]) -> dict[str | int, Any]:
    """The dims of those inputs that have dynamic ones, by position."""
    return {position: axes for position, axes in enumerate(dims) if axes}


def _without_unused(model: Model) -> Model:
    """Forget the stored tensors that no operator reads: they served as shapes, or as nothing."""
    for name in model.kept:
        model.params.remove(name)
    model.kept = set()
    return model
