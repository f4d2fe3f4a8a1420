"""Converters of ATen operators to Relax, one family per file; importing this package fills the table."""

from graphopt.backends.tvm.operators import (
    activation,
    attention,
    convolution,
    create,
    elementwise,
    index,
    linear,
    logic,
    movement,
    normalize,
    padding,
    pool,
    reduce,
    resize,
)

__all__ = [
    "activation",
    "attention",
    "convolution",
    "create",
    "elementwise",
    "index",
    "linear",
    "logic",
    "movement",
    "normalize",
    "padding",
    "pool",
    "reduce",
    "resize",
]
