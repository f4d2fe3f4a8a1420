"""The transforms of Winograd's convolution, in exact rational numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.backends.tvm.kernels.transforms import SQUARES, Transform
from graphopt.backends.tvm.kernels.winograd import transformed_weight
from tests.backends.kernels.building import examples

Matrix = list[list[Fraction]]


@dataclass(frozen=True)
class Exact:
    """A rational number that takes the constants of the transforms, which are written for TIR expressions."""

    value: Fraction
    ty: Any = None

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value)

    def __sub__(self, other: Exact) -> Exact:
        return Exact(self.value - other.value)

    def __mul__(self, constant: Any) -> Exact:
        return Exact(self.value * Fraction(float(constant.value)))


def applied(function: Any, values: Sequence[Fraction]) -> list[Fraction]:
    return [result.value for result in function([Exact(value) for value in values], lambda name, value: value)]


def matrix_of(function: Any, inputs: int) -> Matrix:
    """The matrix of a linear function, from what it makes of unit vectors."""
    columns = [applied(function, [Fraction(i == j) for i in range(inputs)]) for j in range(inputs)]
    return [list(row) for row in zip(*columns, strict=True)]


def weights_of(transform: Transform) -> Matrix:
    """G; floats stand for the simple fractions that they are nearest to."""
    rows = [[Fraction(weight).limit_denominator(24) for weight in row] for row in transform.weights]
    assert [[float(weight) for weight in row] for row in rows] == [list(map(float, row)) for row in transform.weights]
    return rows


def times(matrix: Matrix, values: Sequence[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, values, strict=True)), Fraction(0)) for row in matrix]


def misses(m: int, transform: Transform) -> list[tuple[int, int, int]]:
    """Where A^T (G g * B^T d) is not the correlation of d with g: (output, input, weight), for all unit d and g."""
    inputs = matrix_of(transform.input, m + 2)
    outputs, weights = matrix_of(transform.output, m + 2), weights_of(transform)
    return [
        (i, j, k)
        for j in range(m + 2)
        for k in range(3)
        for i, value in enumerate(
            times(outputs, [g * d for g, d in zip([r[k] for r in weights], [r[j] for r in inputs], strict=True)])
        )
        if value != (j == i + k)
    ]


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_sizes(m: int) -> None:
    transform = SQUARES[m]
    assert len(matrix_of(transform.input, m + 2)) == len(transform.weights) == m + 2
    assert len(matrix_of(transform.output, m + 2)) == m
    assert {len(row) for row in transform.weights} == {3}


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_the_transforms_give_the_correlation_exactly(m: int) -> None:
    """The form is bilinear: what holds for all pairs of unit vectors holds for all."""
    assert misses(m, SQUARES[m]) == []


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_one_percent_of_any_weight_is_seen(m: int) -> None:
    transform = SQUARES[m]
    for row in range(m + 2):
        for column in range(3):
            if transform.weights[row][column]:
                rows = [list(weights) for weights in transform.weights]
                rows[row][column] *= 1.01
                wrong = Transform(tuple(map(tuple, rows)), transform.input, transform.output)
                assert _float_error(m, wrong) > 1e-3, (row, column)
    assert _float_error(m, transform) < 1e-14


def _float_error(m: int, transform: Transform) -> float:
    """The largest error in float64 over all pairs of unit vectors."""
    inputs, outputs = (np.array(matrix_of(f, m + 2), dtype=np.float64) for f in (transform.input, transform.output))
    found = np.einsum("ip,pk,pj->ijk", outputs, np.array(transform.weights), inputs)
    expected = np.array([[[float(j == i + k) for k in range(3)] for j in range(m + 2)] for i in range(m)])
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_turned_or_exchanged_transforms_are_wrong(m: int) -> None:
    transform = SQUARES[m]
    turned = tuple(tuple(reversed(row)) for row in transform.weights)
    exchanged = (transform.weights[0], transform.weights[2], transform.weights[1], *transform.weights[3:])
    assert misses(m, replace(transform, weights=turned))
    assert misses(m, replace(transform, weights=exchanged))
    assert misses(m, replace(transform, input=lambda x, name: transform.input(x, name)[::-1]))
    assert misses(m, replace(transform, output=lambda x, name: transform.output(x, name)[::-1]))


@examples(10)
@given(data=st.data(), m=st.sampled_from(sorted(SQUARES)))
def test_any_square_of_two_dimensions(data: st.DataObject, m: int) -> None:
    """Down the columns, then along the rows: the correlation of two dimensions, exactly."""
    transform, size = SQUARES[m], m + 2
    numbers = st.fractions(-9, 9, max_denominator=7)
    pixels = data.draw(st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=size, max_size=size))
    kernel = data.draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=3, max_size=3))
    g = weights_of(transform)
    inside = _both_ways(lambda v: applied(transform.input, v), pixels)
    weights = _both_ways(lambda v: times(g, v), kernel)
    products = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(inside, weights, strict=True)]
    result = _both_ways(lambda v: applied(transform.output, v), products)
    for i in range(m):
        for j in range(m):
            assert result[i][j] == sum(pixels[i + y][j + x] * kernel[y][x] for y in range(3) for x in range(3))


def _both_ways(once: Any, values: Matrix) -> Matrix:
    columns = [once(list(column)) for column in zip(*values, strict=True)]
    return [once([column[i] for column in columns]) for i in range(len(columns[0]))]


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_values_half_way_are_named(m: int) -> None:
    """Every result, and what several results share, has a name, so that it is computed once."""
    for function, results in ((SQUARES[m].input, m + 2), (SQUARES[m].output, m)):
        named: list[Exact] = []

        def name(_: str, value: Exact, named: list[Exact] = named) -> Exact:
            named.append(value)
            return value

        values = function([Exact(Fraction(3**i)) for i in range(m + 2)], name)
        assert len(values) == results
        assert values == named[-results:]


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_a_transformed_weight_can_be_turned_back(m: int) -> None:
    transform = SQUARES[m]
    back = np.asarray(transform.back)
    assert back.shape == (3, m + 2)
    assert np.abs(back @ np.array(transform.weights) - np.eye(3)).max() < 1e-14
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    whole = transformed_weight(weight, m)
    assert whole.shape == ((m + 2) ** 2, 5, 4)
    undo = torch.from_numpy(back)
    again = torch.einsum("yp,xq,pqoc->ocyx", undo, undo, whole.unflatten(0, (m + 2, m + 2)))
    assert float((again - weight).abs().max()) < 1e-13


@pytest.mark.parametrize("m", sorted(SQUARES))
def test_a_weight_is_transformed_in_float64_and_rounded_once(m: int) -> None:
    weight = torch.randn(3, 2, 3, 3)
    g = weights_of(SQUARES[m])
    ours = transformed_weight(weight, m)
    assert ours.dtype == torch.float32
    for o in range(3):
        for c in range(2):
            exact = _both_ways(lambda v: times(g, v), [[Fraction(float(v)) for v in row] for row in weight[o, c]])
            rounded = torch.tensor([float(value) for row in exact for value in row], dtype=torch.float64)
            difference = (ours[:, o, c].double() - rounded).abs()
            assert bool((difference <= rounded.abs() * 2**-24 + 1e-15).all())
