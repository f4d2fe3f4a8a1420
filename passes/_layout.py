"""Strides, after calls that only reorder storage have gone."""

from __future__ import annotations

import torch

from graphopt.fake import ShapeError
from graphopt.rewriter import Rewriter

__all__ = ["relax_views"]

aten = torch.ops.aten


def relax_views(rw: Rewriter) -> None:
    """Infer every value again, and make a reshape of each view whose input is no longer stored in order.

    `view` asks for strides that it can express, `reshape` copies where there are none. Strides travel through
    element-wise operators, so the view that fails may be far from the `contiguous` that was removed.
    """
    for node in list(rw.graph.nodes):
        if node.op != "call_function":
            continue
        try:
            rw.refresh(node)
        except ShapeError:
            if node.target is not aten.view.default:
                raise
            reshape = rw.call(
                aten.reshape.default, rw.argument(node, "self"), rw.argument(node, "size"), before=node, like=node
            )
            rw.replace(node, reshape, "its input is no longer stored in order")
