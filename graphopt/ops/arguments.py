"""Arguments of a call by their schema names, whether given by position, by keyword or not at all."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.fx import Node

__all__ = ["argument", "arguments", "tensor_arguments"]


class _Required:
    """Marks a schema argument without a default."""


_REQUIRED = _Required()


@cache
def _schema(target: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    """Name of each argument -> (position, default), in schema order."""
    return {
        row.name: (position, row.default_value if row.has_default_value() else _REQUIRED)
        for position, row in enumerate(target._schema.arguments)
    }


def _overload(node: Node) -> torch._ops.OpOverload:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target
    raise TypeError(f"{node.format_node()} calls no operator overload, so its arguments have no names")


def argument(node: Node, name: str, default: Any = _REQUIRED) -> Any:
    """Value of the argument called `name` in the overload's schema.

    Looks at keywords, then positions, then the schema's default, then `default`. Lists given by a default are
    copies.

    Raises:
        TypeError: the node does not call an operator overload.
        KeyError: the schema has no such argument, or it has no value, and `default` is not given.
    """
    position, fallback = _schema(_overload(node)).get(name, (-1, default))
    if name in node.kwargs:
        return node.kwargs[name]
    if 0 <= position < len(node.args):
        return node.args[position]
    if fallback is _REQUIRED:
        fallback = default
    if fallback is _REQUIRED:
        raise KeyError(f"{node.target} has no value for an argument called '{name}'")
    return list(fallback) if isinstance(fallback, list) else fallback


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of the overload's schema with its value, in schema order.

    Raises:
        TypeError: the node does not call an operator overload.
    """
    found: dict[str, Any] = {}
    for name, (position, default) in _schema(_overload(node)).items():
        if name in node.kwargs:
            found[name] = node.kwargs[name]
        elif position < len(node.args):
            found[name] = node.args[position]
        elif default is not _REQUIRED:
            found[name] = list(default) if isinstance(default, list) else default
    return found


def tensor_arguments(node: Node) -> dict[str, Any]:
    """The given arguments that the schema declares as tensors, optional tensors or lists of tensors."""
    types = {row.name: str(row.type) for row in _overload(node)._schema.arguments}
    return {name: value for name, value in arguments(node).items() if "Tensor" in types[name] and value is not None}
