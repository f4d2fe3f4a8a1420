"""The oracle on every group of small nets, each with something that other pruners corrupt or crash on."""

from __future__ import annotations

import pytest

import graphopt as go
from graphopt.analysis.coupling import couple
from tests.coupling import nets
from tests.coupling.removing import choices, worst_error


@pytest.mark.parametrize("name", nets.NETS)
def test_what_is_left_computes_what_the_masked_model_does(name: str) -> None:
    net, args, units = nets.build(name)
    model = go.capture(net, args)
    coupling = couple(model)
    sizes = [len(family) for group in coupling.groups.values() for family in group.families]
    assert max(sizes, default=0) >= units
    for group, family, classes in choices(coupling):
        error = worst_error(coupling, classes)
        assert error <= 1e-5, f"{group.name}, family {family}, {len(classes)} classes: {error:.1e}"
