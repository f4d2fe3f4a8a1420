"""Each pass that moves or drops work, by itself on random nets: outputs, a second run and the number of edits."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import graphopt as go
from graphopt.registry import get_pass
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from tests.compare import relative_error
from tests.random_nets import Net
from tests.strategies import nets

PASSES = ("remove-identity", "simplify-shapes", "fold-constants", "common-subexpressions", "dead-code")
aten = torch.ops.aten


def test_every_pass_agrees_with_eager() -> None:
    edits: Counter[str] = Counter()

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(nets())
    def check(net: Net) -> None:
        model = go.capture(net, net.args(2), dynamic={"x": {0: "batch"}})
        for name in PASSES:
            after, (report,) = go.run(model, name, check=False)
            edits[name] += len(report.edits)
            for size in (2, 3):
                args = net.args(size, seed=7)
                with torch.no_grad():
                    assert relative_error(after(*args), net(*args)) <= 1e-6, name
            assert go.run(after, name, check=False)[1][0].edits == (), name

    check()
    assert edits["remove-identity"] > 3 and edits["common-subexpressions"] > 3 and edits["simplify-shapes"] > 0, edits


@pytest.mark.parametrize("name", PASSES)
def test_ten_thousand_operators(name: str) -> None:
    model = _long_model(1000)
    assert len(model.graph.nodes) > 10_000
    rw = Rewriter(model)
    start = perf_counter()
    get_pass(name)().run(rw)
    assert perf_counter() - start < 10  # one on a quiet machine; a minute when every edit looks at the whole graph
    verify(model)
    assert len(rw.edits) >= {"dead-code": 0}.get(name, 1000)


def _long_model(blocks: int) -> go.Model:
    """A chain of blocks with something for every pass: capturing so many operators would take minutes."""
    model = go.capture(nn.Sequential(nn.ReLU()).eval(), (torch.randn(2, 6, 4),), dynamic={0: {0: "batch"}}).clone()
    rw = Rewriter(model)
    output = next(node for node in model.graph.nodes if node.op == "output")
    value = output.all_input_nodes[0]
    for index in range(blocks):
        for op, *args in (
            (aten.view.default, [-1, 2, 3, 4]),
            (aten.transpose.int, 1, 2),
            (aten.contiguous.default,),
            (aten.view.default, [-1, 6, 4]),
            (aten.sin.default,),
            (aten.dropout.default, 0.5, False),
            (aten.mul.Tensor, 1.0),
        ):
            value = rw.call(op, value, *args, before=output)
        row = rw.call(aten.arange.default, 4, dtype=torch.float32, before=output)
        value = rw.call(aten.add.Tensor, value, rw.call(aten.add.Scalar, row, index % 3, before=output), before=output)
    output.args = ((value,),)
    verify(model)
    return model
