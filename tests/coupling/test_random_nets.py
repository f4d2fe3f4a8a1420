"""The oracle on random nets: any group of any of them can be cut, and what is left is right."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt as go
from benchmarks.removals import error_of, removals
from graphopt.analysis.coupling import couple
from graphopt.analysis.removal import Conflict
from tests.coupling.between import Read
from tests.random_nets import Net
from tests.strategies import nets

EXAMPLES = 40


def test_every_removal_is_right_or_refused() -> None:
    """In float64, in which nothing is lost to rounding."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(nets(), st.booleans())
    def check(net: Net, along_last: bool) -> None:
        inputs = net.args(2, dtype=torch.float64)
        model = go.capture(Read(net, along_last).double().eval(), inputs, dynamic={"x": {0: "batch"}})
        coupling = couple(model)
        for label, classes in removals(coupling):
            try:
                error = error_of(coupling, classes, list(inputs))
            except Conflict as conflict:
                seen[conflict.what] += 1
                continue
            seen["right"] += 1
            assert error <= 1e-9, f"{label}: {error:.1e}"

    check()
    refused = {what: count for what, count in seen.items() if what != "right"}
    assert seen["right"] > EXAMPLES and set(refused) <= {"nothing would be left"}, seen
    assert sum(refused.values()) <= seen["right"] / 20, seen
