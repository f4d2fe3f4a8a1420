"""ONNX models out, by way of `torch.onnx.export`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UnsupportedError
from graphopt.files import write_whole

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.signature import Signature

__all__ = ["save_onnx"]

_LARGEST = 2 * 10**9
"""Bytes of tensors that fit into one file: a protobuf message ends at 2 GiB."""


def save_onnx(model: Model, path: Path) -> None:
    """Write `model` as one file whose inputs and outputs have the signature's names; free sizes stay free.

    Raises:
        UnsupportedError: when an operator has no ONNX form, or the tensors do not fit into one file.
        UsageError: when the file cannot be written.
    """
    import torch

    from graphopt.export import to_exported_program

    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _LARGEST:
        raise UnsupportedError(
            f"the model holds {size:,} bytes, one .onnx file at most {_LARGEST:,}", todo="save it as .gopt or .pt2"
        )
    names = [[spec.name for spec in specs] for specs in (model.signature.inputs, model.signature.outputs)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about opset conversions nobody asked for
            program = torch.onnx.export(
                to_exported_program(model), (), input_names=names[0], output_names=names[1], dynamo=True, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UnsupportedError(
            "torch.onnx cannot export the model",
            why=reason[0] if reason else type(error).__name__,
            todo="save it as .gopt or .pt2",
        ) from error
    assert program is not None  # it is None only where a file name is given
    _name_dims(program.model.graph, model.signature)
    with write_whole(path) as scratch:
        program.save(scratch, external_data=False)


def _name_dims(graph: Any, signature: Signature) -> None:
    """Give free sizes the names of the signature in place of torch's symbols (`s31`), wherever a shape is stored."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, signature.tensor_inputs, strict=True):
        for dim, name in zip(value.shape, spec.dims, strict=True):
            if isinstance(name, str) and name.isidentifier() and isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                names[dim.value] = name
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                value.shape[axis] = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), dim.value)
