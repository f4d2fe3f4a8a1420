"""Training and evaluation mode, as arguments of the operators that know the difference."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.model import Mode, Model
from graphopt.ops import argument, is_training, lookup

__all__ = ["is_running_statistic", "note_fixed_flags", "set_mode", "training_flag", "unchain_counters", "wrong_flags"]

_FIXED = "fixed_mode"
"""Marks an operator whose flag the user's code set by itself, such as a frozen batch norm: it does not switch."""


def training_flag(node: fx.Node) -> str | None:
    """The name of the argument that says whether the operator trains, for operators that have one.

    A norm without running statistics has none: it computes them from its input in both modes.
    """
    info = lookup(node.target) if node.op == "call_function" else None
    return info.training if info is not None and is_training(node) is not None else None


def note_fixed_flags(model: Model) -> None:
    """Mark the operators whose flag disagrees with the mode the model was captured in."""
    for node in model.graph.nodes:
        flag = training_flag(node)
        if flag is not None and bool(argument(node, flag)) != (model.mode == "train"):
            node.meta[_FIXED] = True


def wrong_flags(model: Model) -> list[fx.Node]:
    """The operators whose flag disagrees with the model's mode though nothing fixed it."""
    return [
        node
        for node in model.graph.nodes
        if (flag := training_flag(node)) is not None
        and not node.meta.get(_FIXED)
        and bool(argument(node, flag)) != (model.mode == "train")
    ]


def set_mode(model: Model, mode: Mode) -> None:
    """Switch every training flag that is not fixed. In evaluation the counters of batch norm no longer run."""
    if model.mode == mode:
        return
    model.mode = mode
    for node in wrong_flags(model):
        flag = training_flag(node)
        assert flag is not None
        _set_argument(node, flag, mode == "train")
        node.meta["val"] = model.shapes.propagate(node)
    if mode == "eval":
        for node in [n for n in model.graph.nodes if is_running_statistic(n)]:
            counter = node.args[0]
            assert isinstance(counter, fx.Node)
            model.graph.erase_node(node)
            if not counter.users:
                model.kept.add(str(counter.target))
                model.graph.erase_node(counter)
    model.touch()


def is_running_statistic(node: fx.Node) -> bool:
    """Whether the operator counts batches in place, the one write that a training graph may hold."""
    return _counts(node) and not node.users


def unchain_counters(graph: fx.Graph) -> None:
    """Let every call of a batch norm that is used several times count on the counter itself; torch.export lets the
    second count on the result of the first, which is the same tensor."""
    for node in graph.nodes:
        if _counts(node):
            for user in [user for user in node.users if user.target is node.target and user.args[0] is node]:
                user.args = (node.args[0], *user.args[1:])


def _counts(node: fx.Node) -> bool:
    """Whether the operator adds to the counter of a batch norm in place."""
    if node.target not in (torch.ops.aten.add_.Tensor, torch.ops.aten.add_.Scalar):
        return False
    written = node.args[0]
    return (
        isinstance(written, fx.Node)
        and written.op == "get_attr"
        and str(written.target).endswith("num_batches_tracked")
    )


def _set_argument(node: fx.Node, name: str, value: bool) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [arg.name for arg in node.target._schema.arguments]
    position = names.index(name)
    if position < len(node.args):
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}
