"""Random nets through random orders of the exact passes.

A failure prints the net as Python that builds it, the order of the passes and the inputs, all as small as hypothesis
could make them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt as go
from graphopt.pipeline import Pipeline
from graphopt.registry import PRESETS
from graphopt.transform import Pass
from tests.compare import relative_error
from tests.random_nets import Net
from tests.random_steps import Combine, Conv, Linear
from tests.strategies import nets

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-11}
DYNAMIC = {"x": {0: "batch"}}

# Two linears of one input, both used, and two convolutions of one that are added up are rare among random nets.
BRANCHED = Net(
    shape=(3, 6, 6),
    steps=(Conv(x=0, out=4, kernel=3, padding=1), Conv(x=0, out=4), Combine(x=1, y=2), Conv(x=3, out=2, kernel=3)),
)
GATED = Net(shape=(6,), steps=(Linear(x=0, out=5), Linear(x=0, out=5), Combine(x=1, y=2, kind="mul")))


def _passes() -> list[Pass]:
    (repeat,) = Pipeline.parse(PRESETS["exact"]).steps
    return list(repeat.steps)


orders = st.builds(lambda order, length: order[:length], st.permutations(_passes() * 2), st.integers(1, 16))
dtypes = st.sampled_from((torch.float64, torch.float32))


def sample(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_any_order_of_exact_passes_keeps_what_a_net_computes() -> None:
    edits: Counter[str] = Counter()

    @sample(80)
    @given(nets(), dtypes, orders, st.sampled_from((2, 1, 3, 5)))
    @example(GATED, torch.float32, _passes(), 3)
    @example(BRANCHED, torch.float64, _passes(), 3)
    def agree(net: Net, dtype: torch.dtype, order: Sequence[Pass], batch: int) -> None:
        net = net.to(dtype)
        model = go.capture(net, net.args(dtype=dtype), dynamic=DYNAMIC)
        after, reports = go.run(model, order, check=False)
        args = net.args(batch, seed=1, dtype=dtype)
        with torch.no_grad():
            reference = net(*args)
            assert relative_error(model(*args), reference) == 0
            assert relative_error(after(*args), reference) <= LIMITS[dtype]
        for report in reports:
            edits[report.name] += len(report.edits)

    agree()
    idle = [step.name for step in _passes() if not edits[step.name] and step.name != "dead-code"]
    assert not idle, f"{idle} found nothing to do in any net, so nothing was tested"


def test_the_preset_comes_to_a_fixed_point_that_keeps_gradients() -> None:
    @sample(40)
    @given(nets())
    def settle(net: Net) -> None:
        net = net.double()
        model = go.capture(net, net.args(dtype=torch.float64), dynamic=DYNAMIC)
        after, _ = go.run(model, "exact")
        again, reports = go.run(after, "exact")
        assert not any(report.changed for report in reports) and str(again) == str(after)
        ours, theirs = (_input_gradient(call, net) for call in (after, net))
        assert relative_error(ours, theirs) <= 1e-9

    settle()


def test_in_training_mode_passes_leave_dropout_and_statistics_alone() -> None:
    @sample(40)
    @given(nets(), orders)
    def train(net: Net, order: Sequence[Pass]) -> None:
        net = net.double().train()
        args = net.args(4, dtype=torch.float64)
        model = go.capture(copy.deepcopy(net), args, dynamic=DYNAMIC)
        after, _ = go.run(model, order, check=False)
        torch.manual_seed(1)
        ours = after(*args)
        torch.manual_seed(1)
        theirs = net(*args)
        assert relative_error(ours, theirs) <= 1e-9
        state = net.state_dict()
        for name, value in after.state_dict().items():
            if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-12)

    train()


def _input_gradient(call: Any, net: Net) -> Tensor:
    """Gradient of a sum of squares of the outputs by the input."""
    (x,) = net.args(3, seed=5, dtype=torch.float64)
    x.requires_grad_()
    sum((y**2).sum() for y in call(x)).backward()
    assert x.grad is not None
    return x.grad
