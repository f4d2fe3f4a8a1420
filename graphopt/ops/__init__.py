"""The table of ATen operators: what every analysis and pass knows about an operator, it knows from here.

An operator that is not in the table is a barrier. The table claims little and each claim is tested by running
the operator, so an absent row costs an optimisation and never correctness.
"""

from __future__ import annotations

from graphopt.ops.arguments import argument, arguments, tensor_arguments
from graphopt.ops.axes import (
    Along,
    Axes,
    Broadcast,
    Contracted,
    Created,
    Indexed,
    Moved,
    Normalized,
    Opaque,
    Product,
    Reduced,
    Windowed,
)
from graphopt.ops.contraction import equation, operands
from graphopt.ops.info import Kind, Literal, OpInfo
from graphopt.ops.sizes import Size, numel, product, rank, shape
from graphopt.ops.table import (
    SIZE_ARITHMETIC,
    TABLE,
    is_barrier,
    is_commutative,
    is_in_place,
    is_pure,
    is_training,
    is_view,
    lookup,
)

__all__ = [
    "SIZE_ARITHMETIC",
    "TABLE",
    "Along",
    "Axes",
    "Broadcast",
    "Contracted",
    "Created",
    "Indexed",
    "Kind",
    "Literal",
    "Moved",
    "Normalized",
    "OpInfo",
    "Opaque",
    "Product",
    "Reduced",
    "Size",
    "Windowed",
    "argument",
    "arguments",
    "equation",
    "is_barrier",
    "is_commutative",
    "is_in_place",
    "is_pure",
    "is_training",
    "is_view",
    "lookup",
    "numel",
    "operands",
    "product",
    "rank",
    "shape",
    "tensor_arguments",
]
