"""Which stored tensors are weights to train, and which are plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from graphopt.frontends.onnx.reader import Graph

__all__ = ["parameters"]

_TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_DATA_INPUTS: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),
    "Clip": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
    "Dropout": frozenset({1}),
    "OneHot": frozenset({1, 2}),
    "Pad": frozenset({2}),
    "Pow": frozenset({1}),
    "QLinearConv": frozenset(range(9)),
    "QLinearMatMul": frozenset(range(8)),
    "QuantizeLinear": frozenset({1, 2}),
    "Range": frozenset({0, 1, 2}),
    "Resize": frozenset({1, 2}),
    "RotaryEmbedding": frozenset({1, 2}),
    "Upsample": frozenset({1}),
}
"""Inputs that hold statistics, bounds, scales of a grid or quantisation parameters: buffers, not weights."""

_WEIGHT_INPUTS: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({1, 2}),
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "GRU": frozenset({1, 2, 3}),
    "Gather": frozenset({0}),
    "Gemm": frozenset({0, 1, 2}),
    "GroupNormalization": frozenset({1, 2}),
    "InstanceNormalization": frozenset({1, 2}),
    "LSTM": frozenset({1, 2, 3, 7}),
    "LayerNormalization": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "PRelu": frozenset({1}),
    "RMSNormalization": frozenset({1}),
    "RNN": frozenset({1, 2, 3}),
}


def parameters(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The stored tensors that are weights.

    One is if it is floating point, has at least one axis, and some node uses it other than as data. The value of a
    Constant node with a single element must moreover be used where only weights are: others are factors and bounds.
    """
    uses: dict[str, list[tuple[str, int]]] = {}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            uses.setdefault(name, []).append((node.operator, i))
    return {
        name
        for name, tensor in tensors.items()
        if tensor.dtype in _TRAINABLE
        and tensor.ndim > 0
        and _is_weight(uses.get(name, ()), lone=name not in graph.initializers and tensor.numel() == 1)
    }


def _is_weight(uses: Iterable[tuple[str, int]], *, lone: bool) -> bool:
    if lone:
        return any(i in _WEIGHT_INPUTS.get(operator, ()) for operator, i in uses)
    return any(i not in _DATA_INPUTS.get(operator, ()) for operator, i in uses)
