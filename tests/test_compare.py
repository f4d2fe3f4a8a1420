"""The measure of all numeric tests: what it takes for equal, and what no largest difference may hide."""

from __future__ import annotations

import math

import pytest
import torch

from tests.compare import relative_error

NAN, INF = math.nan, math.inf
REFERENCE = [1.0, -4.0, 2.0]


def error(ours: list[float], reference: list[float]) -> float:
    return relative_error(torch.tensor(ours), torch.tensor(reference))


def test_the_largest_difference_is_relative_to_the_largest_reference() -> None:
    assert error(REFERENCE, REFERENCE) == 0
    assert error([1.0, -4.0, 3.0], REFERENCE) == 0.25
    assert error([0.5, 0.0], [0.0, 0.0]) == 0.5
    ours, reference = {"a": torch.zeros(2), "b": [torch.ones(1)]}, {"a": torch.ones(2), "b": [torch.full((1,), 4.0)]}
    assert relative_error(ours, reference) == 0.75


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_what_is_not_finite_against_a_finite_reference_is_an_infinite_error(wrong: float) -> None:
    for place in range(3):
        ours = list(REFERENCE)
        ours[place] = wrong
        assert error(ours, REFERENCE) == INF
    assert error([wrong, wrong], [0.0, 0.0]) == INF
    assert error([wrong, NAN], [1.0, NAN]) == INF
    finite, reference = torch.zeros(2), torch.tensor(REFERENCE)
    odd = torch.tensor([wrong, *REFERENCE[1:]])
    assert (
        relative_error([finite, odd], [finite, reference]) == relative_error([odd, finite], [reference, finite]) == INF
    )


def test_infinities_and_nan_of_the_reference_must_be_met() -> None:
    assert error([NAN, INF, -INF, 2.0], [NAN, INF, -INF, 2.0]) == 0
    assert error([NAN, 3.0], [NAN, 2.0]) == 0.5
    largest = torch.finfo(torch.float64).max
    for ours, reference in ((7.0, NAN), (INF, NAN), (NAN, INF), (-INF, INF), (largest, INF), (0.0, -INF)):
        with pytest.raises(AssertionError, match="infinities or NaN differ"):
            relative_error(*(torch.tensor([value], dtype=torch.float64) for value in (ours, reference)))


def test_shapes_dtypes_structures_and_integers_must_be_equal() -> None:
    one = torch.ones(2)
    for ours, reference, words in (
        (one, torch.ones(2, 1), "shape"),
        (one, one.double(), "dtype"),
        ([one], (one,), "structures"),
        (one.int(), 2 * one.int(), "integer"),
        ([one, 3], [one, 4], "is not"),
    ):
        with pytest.raises(AssertionError, match=words):
            relative_error(ours, reference)
    assert relative_error(one.int(), one.int()) == 0
