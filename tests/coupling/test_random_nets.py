"""The oracle on random nets: any group of any of them can be cut, and what is left is right."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings

import graphopt as go
from graphopt.analysis.coupling import couple
from graphopt.analysis.removal import Conflict
from tests.coupling.removing import choices, worst_error
from tests.random_nets import Net
from tests.strategies import nets

EXAMPLES = 400


def test_every_removal_is_right_or_refused() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(nets())
    def check(net: Net) -> None:
        model = go.capture(net.double(), net.args(2, dtype=torch.float64), dynamic={"x": {0: "batch"}})
        coupling = couple(model)
        inputs = [torch.randn(2, *net.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))]
        for group, family, classes in choices(coupling):
            try:
                error = worst_error(coupling, classes, inputs)
            except Conflict as conflict:
                seen["refused"] += 1
                seen[f"refused: {conflict.what}"] += 1
                continue
            seen["right"] += 1
            assert error <= 1e-9, f"{group.name}, family {family}, {classes}: {error:.1e}"

    check()
    assert seen["right"] > 2 * EXAMPLES / 3 and seen["refused"] <= seen["right"] / 20, seen
