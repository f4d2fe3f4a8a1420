"""The merging passes on random nets: outputs, a second run, what they do beside each other, and long graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.registry import get_pass
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from tests.compare import relative_error
from tests.passes.branched import trained
from tests.passes.test_exact_on_random_nets import _long_model

PIPELINES = ("merge-sequential", "merge-parallel-conv", "repeat(merge-parallel-conv,merge-sequential,fold-batch-norm)")
SHAPE = (4, 7, 6)


class Web(nn.Module):
    """Steps on earlier values: each a layer on one of them, or the sum or concatenation of two; returns what no step
    reads."""

    def __init__(self, steps: tuple[tuple[str, int, int], ...]) -> None:
        super().__init__()
        self.steps = steps
        layers: dict[str, Callable[[], nn.Module]] = {
            "1x1": lambda: nn.Conv2d(4, 4, 1, bias=False),
            "3x3": lambda: nn.Conv2d(4, 4, 3, padding=1),
            "depthwise": lambda: nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4),
            "norm": lambda: nn.BatchNorm2d(4),
            "relu": nn.ReLU,
            "pool": lambda: nn.AvgPool2d(3, 1, 1),
            "cat": lambda: nn.Conv2d(8, 4, 1),
        }
        self.layers = nn.ModuleList(layers.get(kind, nn.Identity)() for kind, _, _ in steps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for (kind, a, b), layer in zip(self.steps, self.layers, strict=True):
            left, right = values[a], values[b]
            read = torch.cat([left, right], 1) if kind == "cat" else left + right if kind == "add" else left
            values.append(layer(read))
        used = {place for kind, a, b in self.steps for place in ((a, b) if kind in ("add", "cat") else (a,))}
        return tuple(value for place, value in enumerate(values) if place not in used)


@st.composite
def webs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> nn.Module:
    kinds = ("1x1", "3x3", "depthwise", "norm", "relu", "pool", "add", "add", "add", "cat")
    count = draw(st.integers(3, 10))
    # The latest values are read most, so that sums meet what was just computed.
    reads = [st.integers(0, place).map(lambda back, place=place: max(place - back // 2, 0)) for place in range(count)]
    steps = tuple((draw(st.sampled_from(kinds)), draw(reads[i]), draw(reads[i])) for i in range(count))
    return trained(lambda: Web(steps), SHAPE).double()


def test_merging_agrees_with_eager_on_random_nets() -> None:
    edits: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(webs())
    def check(net: nn.Module) -> None:
        inputs = [torch.randn(size, *SHAPE, dtype=torch.float64) for size in (2, 3)]
        model = go.capture(net, (inputs[0],), dynamic={0: {0: "batch"}})
        for pipeline in PIPELINES:
            after, reports = go.run(model, pipeline, check=False)
            for report in reports:
                edits[report.name] += len(report.edits)
            with torch.no_grad():
                assert max(relative_error(after(x), net(x)) for x in inputs) <= 1e-9, pipeline
            assert not any(report.edits for report in go.run(after, pipeline, check=False)[1]), pipeline

    check()
    assert edits["merge-sequential"] > 10 and edits["merge-parallel-conv"] > 10, edits


@pytest.mark.parametrize("name", ["merge-sequential", "merge-parallel-conv"])
def test_ten_thousand_operators(name: str) -> None:
    """Nothing to merge in a long graph takes no longer than looking at it."""
    model = _long_model(1000)
    rw = Rewriter(model)
    start = perf_counter()
    get_pass(name)().run(rw)
    assert perf_counter() - start < 10
    verify(model)
    assert not rw.edits
