"""Regions of a traced graph: gradient and autocast blocks are inlined, control flow is refused."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt.errors import UnsupportedError
from graphopt.printer import source_of

__all__ = ["inline_regions", "refuse_control_flow"]

aten = torch.ops.aten
_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def refuse_control_flow(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Raise UnsupportedError for the first higher-order operator (`cond`, `while_loop`, ...) that is no plain block."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in (_GRAD, _AUTOCAST):
            raise UnsupportedError(
                f"the model has control flow: {node.target.name()}",
                where=source_of(node),
                todo="compute both branches and choose with torch.where, or capture the branch that you deploy",
            )


def inline_regions(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Replace `torch.no_grad` and disabled autocast blocks by their operators.

    What a no_grad block returns is detached, so that gradients stop where they stopped before.

    Raises:
        UnsupportedError: for an enabled autocast block, whose casts are not in the graph.
    """
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node.target.name() == _GRAD:
            enabled, body, *inputs = node.args
            _inline(graph, module, node, body, inputs, detach=not enabled)
        else:
            _, _, enabled, _, body, *inputs = node.args
            if enabled:
                raise UnsupportedError(
                    "the model runs under torch.autocast",
                    where=source_of(node),
                    todo="capture it without autocast; convert it with model.to(dtype) when you want another precision",
                )
            _inline(graph, module, node, body, inputs, detach=False)


def _inline(
    graph: fx.Graph, module: fx.GraphModule, call: fx.Node, body: Any, inputs: list[Any], *, detach: bool
) -> None:
    region = module.get_submodule(str(body.target))
    assert isinstance(region, fx.GraphModule)
    inline_regions(region.graph, region)
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    results: Any = ()
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                results = node.args[0]
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
        leaves = [_result(graph, values[leaf], detach) for leaf in results]
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(leaves[user.args[1]])  # type: ignore[index]  # getitem of a tuple
        graph.erase_node(user)
    graph.erase_node(call)
    if not body.users:
        graph.erase_node(body)
        module.delete_submodule(str(body.target))


def _result(graph: fx.Graph, value: fx.Node, detach: bool) -> fx.Node:
    if not detach or not value.meta["val"].is_floating_point():
        return value
    result = graph.call_function(aten.detach.default, (value,))
    result.meta = dict(value.meta)
    return result
