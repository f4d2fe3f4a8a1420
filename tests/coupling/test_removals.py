"""The oracle on every group of small nets, each with something that other pruners corrupt or crash on."""

from __future__ import annotations

import pytest

import graphopt as go
from benchmarks.removals import error_of, removals
from graphopt.analysis.coupling import couple
from graphopt.sample import sample_inputs
from tests.coupling import nets


@pytest.mark.parametrize("name", nets.NETS)
def test_what_is_left_computes_what_the_masked_model_does(name: str) -> None:
    net, args, units = nets.build(name)
    model = go.capture(net, args)
    coupling = couple(model)
    sizes = [len(family) for group in coupling.groups.values() for family in group.families]
    assert max(sizes, default=0) >= units
    for label, classes in removals(coupling):
        error = error_of(coupling, classes, sample_inputs(model))
        assert error <= 1e-5, f"{label}: {error:.1e}"
