"""Converters of ATen operators to Relax, one family per file; importing this package fills the table."""

from graphopt.backends.tvm.operators import (
    attention,
    convolution,
    create,
    elementwise,
    index,
    linear,
    movement,
    normalize,
    pool,
    reduce,
    resize,
)

__all__ = [
    "attention",
    "convolution",
    "create",
    "elementwise",
    "index",
    "linear",
    "movement",
    "normalize",
    "pool",
    "reduce",
    "resize",
]
