"""Merging of equal computations."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.ops import arguments, is_commutative, is_pure, is_training, is_view
from graphopt.params import ParamKind
from graphopt.passes._facts import is_written
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Pass

__all__ = ["CommonSubexpressions"]

LARGEST_CONSTANT = 1 << 20
"""Bytes up to which constants are compared; beyond it equal constants are rare and hashing takes time."""


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Compute once what is computed several times.

    What:
        Calls of one operator with equal arguments become one call. Equal constants of the program (tensors that are
        no parameters and not in the state dict) become one constant.

    Algebra:
        f(a, b) = f(a, b); also f(a, b) = f(b, a) where f is commutative bit by bit (add, mul, maximum, ..).
        Default arguments are filled in before calls are compared, and 1, 1.0 and True are different arguments.

    When it applies:
        The operator is in the table and pure: a dropout in training or a random number is drawn anew each time, a
        batch norm in training counts twice. An operator with a training flag is left alone in evaluation too:
        when the model is trained again, two dropouts are to draw two masks. Tensors that are written to, views of
        them, parameters and buffers are never merged: two parameters that are equal today are trained apart.

    Safety:
        Exact: the same bits, and the same gradients, summed in another order.

    Cost:
        Never more operators or multiplications; a value that is used again later stays in memory longer. Linear in
        the number of operators.

    Source:
        Value numbering, Cocke and Schwartz, Programming Languages and Their Compilers (1970).

    Example:
        >>> import torch, graphopt as go
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, x, y):
        ...         return (x + y).exp() * (y + x).exp()
        >>> model = go.capture(Twice(), (torch.randn(3), torch.randn(3)))
        >>> smaller, (report,) = go.run(model, "common-subexpressions")
        >>> [edit.why for edit in report.edits]
        ["equal to 'add'", "equal to 'exp'"]
    """

    name: ClassVar[str] = "common-subexpressions"

    def run(self, rw: Rewriter) -> None:
        """Number values in order; a call with known numbers all over is the earlier one."""
        _merge_constants(rw)
        volatile = {node for node in rw.graph.nodes if is_written(node)}
        seen: dict[Hashable, Node] = {}
        for node in rw.find():
            if any(used in volatile for used in node.all_input_nodes):
                if is_view(node):
                    volatile.add(node)
                continue
            first = seen.setdefault(_key(node), node)
            if first is node:
                continue
            reason = _why_apart(node)
            if reason is not None:
                rw.skip(node, reason)
            else:
                rw.replace(node, first, f"equal to '{first.name}'")


def _why_apart(node: Node) -> str | None:
    """Why two calls that look equal are not one."""
    if is_training(node) is not None and "fixed_mode" not in node.meta:
        return "in training it would be another call: it draws or counts anew"
    return None if is_pure(node) else "it is not the same at every call"


def _key(node: Node) -> Hashable:
    """Equal for calls that compute the same."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return (node.target, _argument_key(node.args), _argument_key(node.kwargs))
    values = list(arguments(node).values())
    if is_commutative(node) and isinstance(values[1], Node):
        values[:2] = sorted(values[:2], key=id)
    return (node.target, _argument_key(values))


def _argument_key(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(_argument_key(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _argument_key(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return ("slice", _argument_key((value.start, value.stop, value.step)))
    if isinstance(value, float):
        return ("float", value.hex())  # tells 0.0 and -0.0 apart, and knows a NaN again
    return (type(value).__name__, value)


def _merge_constants(rw: Rewriter) -> None:
    seen: dict[Hashable, Node] = {}
    for node in [n for n in rw.graph.nodes if n.op == "get_attr"]:
        if rw.exhausted:
            return
        key = _content(rw, node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            rw.replace(node, first, f"equal to '{first.target}'")


def _content(rw: Rewriter, node: Node) -> Hashable | None:
    """Dtype, shape and bytes of a constant that nothing writes to; None for other tensors."""
    name = str(node.target)
    tensor = rw.params[name]
    if rw.params.kind(name) is not ParamKind.CONSTANT or tensor.device.type != "cpu" or name in rw.params.precision:
        return None
    if tensor.nbytes > LARGEST_CONSTANT or any(_may_write(user) for user in node.users):
        return None
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return (tensor.dtype, tuple(tensor.shape), hashlib.sha256(data).digest())


def _may_write(user: Node) -> bool:
    """Whether the user writes to its arguments, or would in training."""
    return user.op == "call_function" and (not is_pure(user) or is_training(user) is not None)
