"""Calling an operator of the table, and making the graph node of the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from tests.ops.samples import Call


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), which or "default")


def full(name: str) -> str:
    return name if "." in name else f"{name}.default"


def flat(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def run(name: str, call: Call) -> Any:
    """Call the operator and check that it leaves its inputs alone."""
    before = [tensor.clone() for tensor in flat(call)]
    result = overload(name)(*call[0], **call[1])
    for tensor, copy in zip(flat(call), before, strict=True):
        assert torch.equal(tensor, copy), f"{name} changed an input"
    return result


def node_of(name: str, call: Call) -> Node:
    """A graph node that makes the same call, with `meta["val"]` everywhere."""
    graph = Graph()

    def placeholder(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = graph.placeholder("x")
        made.meta["val"] = value
        return made

    args, kwargs = pytree.tree_map(placeholder, call)
    node = graph.call_function(overload(name), args, kwargs)
    node.meta["val"] = overload(name)(*call[0], **call[1])
    return node


def named(name: str, call: Call) -> dict[str, Any]:
    """The call's arguments by schema name, tensors included."""
    schema = [row.name for row in overload(name)._schema.arguments]
    return dict(zip(schema, call[0], strict=False)) | call[1]


def rerun(name: str, values: dict[str, Any]) -> Any:
    return run(name, ((), values))


def samples(*tables: dict[str, list[Call]]) -> list[Any]:
    return [
        pytest.param(full(name), call, id=f"{name}-{i}")
        for table in tables
        for name, calls in table.items()
        for i, call in enumerate(calls)
    ]


def same(a: Any, b: Any) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
