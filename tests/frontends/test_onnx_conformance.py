"""The node cases of onnx: none comes out wrong. `benchmarks/onnx_conformance.py` runs all through torch.export."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from benchmarks.onnx_conformance import cases, run_case

all_cases = cache(cases)


def sample() -> list[Any]:
    """One case for each of 90 operators, spread over the list; the functions' expansions left out."""
    first: dict[str, Any] = {}
    for case in all_cases():
        nodes = case.model.graph.node
        if len(nodes) == 1:
            first.setdefault(nodes[0].op_type, case)
    chosen = list(first.values())
    return chosen[:: max(1, len(chosen) // 90)]


def test_no_case_is_wrong() -> None:
    outcomes = [run_case(case, export=False) for case in all_cases()]
    counts = Counter(outcome.status for outcome in outcomes)
    assert [outcome for outcome in outcomes if outcome.status == "wrong"] == []
    assert counts["passed"] >= 1280 and counts["passed"] + counts["fixed"] >= 1590, counts
    assert sum(outcome.rounding for outcome in outcomes) <= 5
    assert all(outcome.detail for outcome in outcomes if outcome.status == "refused")


def test_a_sample_comes_through_the_capture_as_it_runs() -> None:
    for case in sample():
        captured, eager = run_case(case), run_case(case, export=False)
        assert captured.status == eager.status, captured


@pytest.mark.parametrize("shift", [0.01, -0.01])
def test_one_percent_is_wrong(shift: float) -> None:
    """The comparison sees a difference of one percent."""
    case = next(c for c in all_cases() if c.name == "test_softmax_example")
    inputs, (expected,) = case.data_sets[0]
    spoiled = type(case)(**{**vars(case), "data_sets": [(inputs, [expected * (1 + shift)])]})
    assert run_case(spoiled, export=False).status == "wrong"
