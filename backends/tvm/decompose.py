"""Operators that no converter takes, written in terms of others by torch's decompositions."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx

import graphopt.backends.tvm.operators  # noqa: F401  # fills the table
from graphopt.backends.tvm.registry import CONVERTERS
from graphopt.export import from_exported_program, to_exported_program
from graphopt.model import Model

__all__ = ["decomposed", "holds_tensor"]

_ROUNDS = 3
"""A decomposition may bring operators that have to be decomposed themselves."""


def decomposed(model: Model) -> Model:
    """The model with every operator decomposed that has no converter, but a decomposition in torch; the model itself
    when there is none. Going through `torch.export` takes as long as capturing, so it is done only then."""
    table = torch.export.default_decompositions()
    for _ in range(_ROUNDS):
        targets = {node.target for node in model.graph.nodes if _computes_tensors(node)}
        wanted: dict[Any, Any] = {t: table[t] for t in targets if t not in CONVERTERS and t in table}
        if not wanted:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own use of what it will take away
            program = to_exported_program(model).run_decompositions(wanted)
        names = [spec.name for spec in model.signature.inputs], [spec.name for spec in model.signature.outputs]
        model = from_exported_program(program, mode=model.mode, input_names=names[0], output_names=names[1])
    return model


def _computes_tensors(node: fx.Node) -> bool:
    """Whether a node needs conversion: sizes do not."""
    return node.op == "call_function" and holds_tensor(node.meta["val"])


def holds_tensor(value: Any) -> bool:
    """Whether a fake value is a tensor, or has one in it."""
    if isinstance(value, tuple | list):
        return any(isinstance(item, torch.Tensor) for item in value)
    return isinstance(value, torch.Tensor)
