"""The whole table, and the questions asked of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from graphopt.ops import (
    contraction,
    creation,
    elementwise,
    indexing,
    movement,
    normalization,
    pooling,
    recurrent,
    reduction,
)
from graphopt.ops.arguments import argument
from graphopt.ops.axes import Created, Moved, Opaque
from graphopt.ops.info import Kind, OpInfo, rows
from graphopt.ops.sizes import Size, product, to_size

__all__ = ["SIZE_ARITHMETIC", "TABLE", "is_barrier", "is_commutative", "is_pure", "is_training", "is_view", "lookup"]

FAMILIES = (
    elementwise,
    movement,
    contraction,
    normalization,
    pooling,
    reduction,
    indexing,
    creation,
    recurrent,
)

TABLE: Mapping[str, OpInfo] = MappingProxyType(
    {name: info for family in FAMILIES for name, info in family.ROWS.items()}
)
"""Overload, such as `add.Tensor` for `torch.ops.aten.add.Tensor` -> what is known about it."""

SIZE = OpInfo(Kind.SIZE, Created())
GETITEM = OpInfo(Kind.MOVEMENT, Moved(), view=True)

SIZE_ARITHMETIC: frozenset[Any] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow,
        operator.neg, operator.pos, operator.abs, operator.lshift, operator.rshift, operator.eq, operator.ne,
        operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, operator.not_, math.ceil,
        math.floor, math.trunc, round, torch.sym_max, torch.sym_min, torch.sym_sum, torch.sym_int, torch.sym_float,
        torch.sym_not, torch.sym_ite, torch.sym_sqrt,
    }
)  # fmt: skip
"""Python functions on sizes that torch.export leaves in a graph."""

# What a captured graph calls besides ATen overloads: indexing of several outputs, and arithmetic on sizes.
PYTHON: Mapping[object, OpInfo] = MappingProxyType({operator.getitem: GETITEM} | dict.fromkeys(SIZE_ARITHMETIC, SIZE))
SIZES = {
    "sym_size.int": SIZE,
    "sym_numel.default": SIZE,
    "sym_stride.int": SIZE,
    "sym_storage_offset.default": SIZE,
}


def lookup(target: object) -> OpInfo | None:
    """The row of an operator, by the target of its call. None: unknown, so a barrier."""
    try:
        return _row(target)
    except TypeError:  # not hashable, so nothing that a graph can call
        return None


@cache
def _row(target: object) -> OpInfo | None:
    if not isinstance(target, torch._ops.OpOverload):
        return PYTHON.get(target)
    namespace, _, name = str(target).partition(".")
    return (TABLE.get(name) or SIZES.get(name)) if namespace == "aten" else None


def is_pure(node: Node) -> bool:
    """Whether the node may be removed when unused, merged with an equal one, or computed beforehand.

    Placeholders and the output are not; reading a parameter or a buffer is.
    """
    if node.op == "get_attr":
        return True
    info = lookup(node.target) if node.op == "call_function" else None
    return info is not None and not _draws(node, info) and not (info.stateful and is_training(node))


def _draws(node: Node, info: OpInfo) -> bool:
    """Whether the call draws random numbers."""
    if info.random:
        return True
    if info.training and not argument(node, info.training):
        return False
    if info.probability:
        return bool(argument(node, info.probability) > 0)
    return info.kind is Kind.RANDOM


def is_training(node: Node) -> bool | None:
    """The training flag of a call. None: the operator has none, or the flag does not follow the model's mode,
    as in a norm that keeps no running statistics and computes them from its input in both modes.
    """
    info = lookup(node.target)
    if info is None or info.training is None:
        return None
    if info.stateful and argument(node, "running_mean") is None:
        return None
    return bool(argument(node, info.training))


def is_commutative(node: Node) -> bool:
    """Whether the first two tensor operands of this call may be swapped without changing a bit."""
    info = lookup(node.target)
    return info is not None and info.commutative and argument(node, "alpha", 1) == 1


def is_barrier(node: Node) -> bool:
    """Whether nothing may move across the node: an operator that is unknown, or about whose axes nothing is
    claimed.
    """
    if node.op != "call_function":
        return node.op in ("call_module", "call_method")
    info = lookup(node.target)
    return info is None or isinstance(info.axes, Opaque)


def is_in_place(node: Node) -> bool:
    """Whether the operator's schema says that it writes to an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(arg.alias_info is not None and arg.alias_info.is_write for arg in node.target._schema.arguments)


def is_view(node: Node) -> bool:
    """Whether the output shares memory with the first input, so that the call moves no bytes.

    A reshape or `contiguous` shares memory where its input is stored in order of its axes, a cast where the
    dtype stays.
    """
    info = lookup(node.target)
    if info is None or not info.view:
        return False
    if info is GETITEM:
        return True
    if str(node.target) in SOMETIMES:
        source, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
        return source.dtype == made.dtype and source.device == made.device and in_order(source)
    return True


SOMETIMES = frozenset(
    f"aten.{name}"
    for name in (
        *rows(elementwise.CASTS, SIZE),
        "reshape.default",
        "flatten.using_ints",
        "contiguous.default",
    )
)


def in_order(tensor: torch.Tensor) -> bool:
    """Whether a tensor is stored densely in order of its axes, decided on the expressions of sizes and
    strides.
    """
    expected: Size = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if to_size(size) != 1 and to_size(stride) != expected:
            return False
        expected = product((expected, to_size(size)))
    return True
