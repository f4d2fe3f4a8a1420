"""Products with a packed matrix, against float64: every count of rows, columns that do not fill vectors, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import division, packed_vectors, product, product_kernel
from tests.backends.kernels.building import (
    Library,
    a_machine,
    apply,
    bias_residual_relu,
    built,
    compiled,
    examples,
    operand,
    packed,
    size,
)
from tests.compare import relative_error

LIMIT = 2e-6
BLOCKS = a_machine(threads=2, l2=256)
"""A cache so small that few rows fit, and two threads: the work is cut into blocks, and into groups of columns."""


def lowered(lead: Sequence[Any], depth: int, columns: int, machine: Machine) -> Any:
    """The function of relu(x @ w + bias + residual)."""
    lanes = machine.lanes_for(columns)
    x, w = operand(*lead, depth), operand(len(packed_vectors(columns, lanes)), depth, lanes, name="w")
    bias, residual = operand(columns, name="bias"), operand(*lead, columns, name="residual")
    result = bias_residual_relu(product(x, w, columns), bias, residual)
    return apply(product_kernel, machine, [x, w, bias, residual], result)


def error_of(kernel: Library, lead: Sequence[int], depth: int, columns: int, lanes: int) -> float:
    x, w = torch.randn(*lead, depth), torch.randn(columns, depth)
    bias, residual = torch.randn(columns), torch.randn(*lead, columns)
    ours = kernel(x, packed(w, 1, lanes), bias, residual, shape=(*lead, columns))
    return relative_error(ours.double(), (x.double() @ w.double().T + bias + residual).relu())


@pytest.mark.parametrize(
    "machine", [a_machine(4), a_machine(8), a_machine(16), a_machine(16, multiply_adds=1), BLOCKS], ids=str
)
def test_every_count_of_rows(machine: Machine) -> None:
    kernels = compiled({f"rows_{n}": lowered([n], 6, 3 * machine.lanes, machine) for n in range(1, 18)})
    for n in range(1, 18):
        assert error_of(kernels[f"rows_{n}"], [n], 6, 3 * machine.lanes, machine.lanes) < LIMIT, n


@pytest.mark.parametrize(
    "machine", [a_machine(4), a_machine(8), a_machine(16), a_machine(16, multiply_adds=1), BLOCKS], ids=str
)
def test_columns_below_at_above_and_between_whole_vectors(machine: Machine) -> None:
    lanes = machine.lanes
    widths = [1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes - 1, 2 * lanes, 5 * lanes + 3, 7 * lanes, 13 * lanes - 1]
    kernels = compiled({f"columns_{c}": lowered([5], 4, c, machine) for c in widths})
    for columns in widths:
        error = error_of(kernels[f"columns_{columns}"], [5], 4, columns, machine.lanes_for(columns))
        assert error < LIMIT, columns


@pytest.mark.parametrize("depth", [256, 384, 5 * 131])
def test_chunks_of_the_depth(depth: int) -> None:
    """Sums are kept from one chunk to the next where the rows of all are too much for the cache."""
    machine = a_machine(threads=2, l2=8 << 10)
    cases = {"blocks": (41, 48), "columns": (7, 75), "one": (1, 40)}
    chunks = {name: division(rows, -(-c // 8), depth, machine)[0].chunks for name, (rows, c) in cases.items()}
    assert chunks["blocks"] > 1 and chunks["columns"] > 1
    kernels = compiled({name: lowered([rows], depth, c, machine) for name, (rows, c) in cases.items()})
    for name, (rows, columns) in cases.items():
        assert error_of(kernels[name], [rows], depth, columns, 8) < LIMIT, name


def test_a_free_size_between_constant_ones() -> None:
    """Tokens first, images second: places are remainders by the free size."""
    machine = a_machine()
    kernel = compiled({"kernel": lowered([17, size(), 2], 24, 40, machine)})["kernel"]
    plain = compiled({"kernel": lowered([17, size()], 24, 40, machine)})["kernel"]
    for n in (1, 2, 5):
        assert error_of(kernel, [17, n, 2], 24, 40, 8) < LIMIT
        assert error_of(plain, [17, n], 24, 40, 8) < LIMIT


@pytest.mark.parametrize("lead", [[], [1], [2, 3], [1, 1, 7], [2, 1, 2, 3]], ids=str)
def test_any_number_of_leading_axes_and_a_depth_of_one(lead: list[int]) -> None:
    machine = a_machine()
    kernels = compiled({f"depth_{depth}": lowered(lead, depth, 11, machine) for depth in (1, 2, 33)})
    for depth in (1, 2, 33):
        assert error_of(kernels[f"depth_{depth}"], lead, depth, 11, 8) < LIMIT


@pytest.mark.parametrize(
    "machine", [a_machine(4), a_machine(8), a_machine(16), a_machine(16, multiply_adds=1), BLOCKS], ids=str
)
@pytest.mark.parametrize("columns", [3, 19])
def test_a_free_number_of_rows(machine: Machine, columns: int) -> None:
    kernel = compiled({"kernel": lowered([size()], 7, columns, machine)})["kernel"]
    for rows in (*range(32), 63, 100):
        assert error_of(kernel, [rows], 7, columns, machine.lanes_for(columns)) < LIMIT, rows


@pytest.mark.parametrize(
    ("lead", "calls"),
    [
        (["n", 3], [(1, 3), (2, 3), (5, 3)]),
        (["n", 5], [(1, 5), (3, 5)]),
        (["n", 9, 2], [(1, 9, 2), (2, 9, 2)]),
        (["n", "m"], [(1, 1), (2, 3), (4, 9), (0, 3)]),
        ([2, "n"], [(2, 1), (2, 7)]),
        ([2, "n", 17], [(2, 1, 17), (2, 3, 17)]),
    ],
    ids=str,
)
def test_a_free_size_anywhere(lead: list[Any], calls: list[tuple[int, ...]]) -> None:
    sizes = [size(s) if isinstance(s, str) else s for s in lead]
    for machine in (a_machine(), BLOCKS):
        kernel = compiled({"kernel": lowered(sizes, 5, 19, machine)})["kernel"]
        for call in calls:
            assert error_of(kernel, call, 5, 19, 8) < LIMIT, call


@examples(15)
@given(
    lead=st.lists(st.integers(1, 9), max_size=3),
    depth=st.integers(1, 40),
    columns=st.integers(1, 70),
    lanes=st.sampled_from((4, 8, 16)),
    threads=st.integers(1, 4),
    l2=st.sampled_from((64, 1024, 512 << 10)),
)
def test_any_product(lead: list[int], depth: int, columns: int, lanes: int, threads: int, l2: int) -> None:
    kernel = compiled({"kernel": lowered(lead, depth, columns, a_machine(lanes, threads, l2))})["kernel"]
    assert error_of(kernel, lead, depth, columns, lanes) < LIMIT


def _square(dtype: str = "float32") -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    x, w = operand(8, 5, dtype=dtype), operand(1, 5, 8, dtype=dtype, name="w")
    return x, w, product(x, w, 8)


def test_only_float32_is_taken() -> None:
    for dtype, taken in (("float32", True), ("float64", False), ("float16", False), ("int32", False)):
        x, w, result = _square(dtype)
        assert (apply(product_kernel, a_machine(), [x, w], result) is not None) == taken, dtype


def test_what_follows_may_read_the_product_in_place_only() -> None:
    x, w, result = _square()
    other = operand(8, 8, name="other")
    follows = {
        "in place": (lambda i, j: result(i, j) * 2, True),
        "in place, twice": (lambda i, j: result(i, j) * result(i, j), True),
        "another tensor turned": (lambda i, j: result(i, j) + other(j, i), True),
        "turned": (lambda i, j: result(j, i), False),
        "moved": (lambda i, j: result(i, tirx.min(j + 1, 7)), False),
        "in place and turned": (lambda i, j: result(i, j) + result(j, i), False),
        "the first row": (lambda i, j: result(i, j) - result(0, j), False),
    }
    for name, (element, taken) in follows.items():
        last = te.compute((8, 8), element, name="last")
        assert (apply(product_kernel, a_machine(), [x, w, other], last) is not None) == taken, name


def test_what_reads_the_product_twice_or_another_tensor_turned_is_right() -> None:
    x, w, result = _square()
    other = operand(8, 8, name="other")
    last = te.compute((8, 8), lambda i, j: result(i, j) * result(i, j) + other(j, i), name="last")
    a, b, c = torch.randn(8, 5), torch.randn(8, 5), torch.randn(8, 8)
    ours = built(product_kernel, a_machine(), [x, w, other], last)(a, packed(b, 1, 8), c, shape=(8, 8))
    assert relative_error(ours.double(), (a.double() @ b.double().T) ** 2 + c.T) < LIMIT


def test_a_sum_over_the_product_is_refused() -> None:
    x, w, result = _square()
    k = te.reduce_axis((0, 8), "k")
    total = te.compute((8,), lambda i: te.sum(result(i, k), axis=[k]), name="total")
    assert apply(product_kernel, a_machine(), [x, w], total) is None


def test_one_percent_is_seen() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x * 1.01

    kernel = compiled({"kernel": lowered([5], 6, 11, a_machine())})["kernel"]
    x, w, none = torch.randn(5, 6), torch.randn(11, 6), torch.zeros(11)
    ours = kernel(wrong(x), packed(w, 1, 8), none, torch.zeros(5, 11), shape=(5, 11))
    assert relative_error(ours, (x @ w.T).relu()) > 1e-3
