"""The ONNX operators, one family per file; importing this package fills the registry."""

from __future__ import annotations

from graphopt.frontends.onnx.operators import (
    activations,
    attention,
    conv,
    data,
    elementwise,
    gather,
    loss,
    matmul,
    norm,
    pool,
    quantize,
    reduce,
    resize,
    rnn,
    shape,
    signal,
    space,
)

__all__ = [
    "activations",
    "attention",
    "conv",
    "data",
    "elementwise",
    "gather",
    "loss",
    "matmul",
    "norm",
    "pool",
    "quantize",
    "reduce",
    "resize",
    "rnn",
    "shape",
    "signal",
    "space",
]
