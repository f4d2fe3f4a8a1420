"""The generator of random nets: its text rebuilds the net, and failures shrink to the steps that matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from tests import random_steps, tiny
from tests.random_nets import Net
from tests.random_steps import BatchNorm, Conv
from tests.strategies import example_inputs, nets

QUICK = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(st.data())
def test_text_of_a_net_rebuilds_it(data: st.DataObject) -> None:
    net = data.draw(nets())
    again = eval(repr(net), {"Net": Net, **vars(random_steps)})
    args = data.draw(example_inputs(net))
    for ours, theirs in zip(again(*args), net(*args), strict=True):
        assert torch.equal(ours, theirs) and ours.shape[0] == args[0].shape[0]
        assert torch.isfinite(ours).all()


def test_failures_shrink_to_the_steps_that_matter() -> None:
    def suspicious(net: Net) -> bool:
        convs = [i for i, step in enumerate(net.steps) if isinstance(step, Conv) and step.groups > 1]
        return any(isinstance(step, BatchNorm) and i - 1 in convs for i, step in enumerate(net.steps))

    options = settings(
        max_examples=2000,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        deadline=None,
    )
    smallest = find(nets(), suspicious, settings=options)
    assert [type(step) for step in smallest.steps] == [Conv, BatchNorm]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_tiny_nets_are_the_same_every_time_and_differ_between_samples(name: str) -> None:
    with torch.no_grad():
        outputs, again = (pytree.tree_leaves(net.module(*net.args())) for net in (tiny.build(name), tiny.build(name)))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert any(float((y[0] - y[1]).abs().max()) > 0.05 * float(y.abs().max()) for y in outputs)
