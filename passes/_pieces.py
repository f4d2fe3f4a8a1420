"""Layers side by side that become one: what it is called, and who can read a piece of its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.ops import lookup
from graphopt.rewriter import Node

__all__ = ["joined_name", "why_in_one_piece"]

aten = torch.ops.aten


def why_in_one_piece(node: Node) -> str | None:
    """Who may need the output without gaps between its rows; None when all read it, or views of it, by strides."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            info = lookup(user.target) if user.op == "call_function" else None
            if info is None and user.op == "output":
                return "it is an output of the model, which would have gaps between its rows"
            if info is None:
                return f"'{user.name}' ({user.target}) is unknown and may need it without gaps between its rows"
            if info.view and user.target is not aten.contiguous.default and user not in seen:
                seen.add(user)
                stack.append(user)
    return None


def joined_name(names: Sequence[str]) -> str:
    """A module path for the merged layer: what all have in common, then their own names in one.

    `attn.q.weight` and `attn.k.weight` make `attn.q_k`.
    """
    paths = [name.removesuffix(".weight").split(".") for name in names]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    own = ["_".join(path[common:]) for path in paths]
    joined = "_".join(own) if len(own) <= 4 else f"{own[0]}_to_{own[-1]}"
    return ".".join([*paths[0][:common], joined])
