"""Sizes of the tensors in a graph, as numbers or as sympy expressions; no size is ever forced to a number.

`torch.SymInt` arithmetic runs through the shape environment and may add guards. The expressions behind it do
not, so everything that counts (multiply-accumulates, bytes, elements) counts in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.fx import Node

if TYPE_CHECKING:
    import sympy

Size: TypeAlias = "int | sympy.Expr"

__all__ = ["Size", "numel", "product", "rank", "shape", "to_size"]


def to_size(value: int | torch.SymInt) -> Size:
    """An int as it is; a `torch.SymInt` as the sympy expression behind it, or an int where that is a
    constant.
    """
    if not isinstance(value, torch.SymInt):
        return int(value)
    expression: sympy.Expr = value.node.expr
    return int(expression) if expression.is_Integer else expression


def shape(value: Any) -> tuple[Size, ...]:
    """Shape of a tensor, or of the tensor that a node makes (`node.meta["val"]`).

    Raises:
        TypeError: the node makes something else than one tensor.
    """
    tensor = value.meta.get("val") if isinstance(value, Node) else value
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{value} is {type(tensor).__name__}, not a tensor with a shape")
    return tuple(to_size(dim) for dim in tensor.shape)


def rank(node: Node) -> int:
    """Number of axes of the tensor that `node` makes."""
    return len(shape(node))


def numel(value: Any) -> Size:
    """Number of elements of a tensor, or of the tensor that a node makes."""
    return product(shape(value))


def product(sizes: Iterable[Size]) -> Size:
    """Product of sizes; 1 of none."""
    return _product(tuple(sizes))


@lru_cache(maxsize=65536)
def _product(sizes: tuple[Size, ...]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total
