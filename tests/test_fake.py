"""Shapes without data: free sizes stay free."""

from __future__ import annotations

import pytest
import torch

from graphopt.fake import Shapes
from graphopt.signature import Range

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("operator", "args", "expected"),
    [
        (aten.pad.default, ([0, 0, 0, 4, 0, 4],), ("batch", 12, 12, 3)),
        (aten.constant_pad_nd.default, ([0, 1, 2, 1],), ("batch", 8, 11, 4)),
        (aten.roll.default, ([1, 2], [1, 2]), ("batch", 8, 8, 3)),
    ],
)
def test_operators_that_torch_runs_in_cpp_leave_a_free_size_free(
    operator: torch._ops.OpOverload, args: tuple[object, ...], expected: tuple[object, ...]
) -> None:
    shapes = Shapes()
    batch = shapes.declare("batch", Range(0, None), 3)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = shapes.tensor(torch.float32, ("batch", 8, 8, 3), {"batch": batch})
    node = graph.call_function(operator, (x, *args))
    assert shapes.dims(shapes.propagate(node)) == expected
    assert not shapes.env.replacements
