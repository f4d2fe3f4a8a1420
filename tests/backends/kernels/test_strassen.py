"""Strassen's product against float64: rows, columns and chunks of every kind; and when the model takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tvm import te

from graphopt.backends.tvm.kernels.fused import Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.strassen import (
    BACK,
    PRODUCTS,
    division,
    quarters,
    strassen,
    strassen_kernel,
    strassen_pays,
)
from tests.backends.kernels.building import (
    Library,
    a_machine,
    apply,
    bias_residual_relu,
    compiled,
    examples,
    operand,
    size,
)
from tests.compare import relative_error

LIMIT = 3e-6

SMALL = a_machine(threads=2, l2=16 << 10)
"""A cache so small that few rows fit, and two threads: the work is cut into blocks, groups and chunks."""

BETWEEN = a_machine(threads=2, l2=32 << 10)


def lowered(lead: Sequence[Any], depth: int, columns: int, machine: Machine) -> Any:
    """The function of relu(x @ w + bias + residual)."""
    pairs, lanes = -(-columns // (2 * machine.lanes)), machine.lanes
    x, w = operand(*lead, depth), operand(pairs, PRODUCTS, depth // 2, lanes, name="w")
    back, bias = operand(4, PRODUCTS, name="back"), operand(columns, name="bias")
    residual = operand(*lead, columns, name="residual")
    result = bias_residual_relu(strassen(x, w, back, columns), bias, residual)
    return apply(strassen_kernel, machine, [x, w, back, bias, residual], result)


def error_of(
    kernel: Library, lead: Sequence[int], depth: int, columns: int, lanes: int = 8, factor: float = 1.0
) -> float:
    """The error of a kernel, whose left operand is multiplied by a factor."""
    x, w = torch.randn(*lead, depth), torch.randn(columns, depth)
    bias, residual = torch.randn(columns), torch.randn(*lead, columns)
    back = torch.from_numpy(BACK)
    ours = kernel(x * factor, quarters(w, lanes), back, bias, residual, shape=(*lead, columns))
    return relative_error(ours.double(), (x.double() @ w.double().T + bias + residual).relu())


MACHINES = pytest.mark.parametrize(
    "machine",
    [a_machine(4), a_machine(8), a_machine(16), a_machine(16, multiply_adds=1), SMALL, BETWEEN],
    ids=["4", "8", "16", "narrow", "small", "between"],
)


@MACHINES
def test_every_count_of_rows(machine: Machine) -> None:
    counts = [*range(2, 15), 31, 50]
    kernels = compiled({f"rows_{n}": lowered([n], 2 * machine.lanes, 4 * machine.lanes, machine) for n in counts})
    for n in counts:
        assert error_of(kernels[f"rows_{n}"], [n], 2 * machine.lanes, 4 * machine.lanes, machine.lanes) < LIMIT, n


@MACHINES
def test_columns_at_and_between_whole_pairs(machine: Machine) -> None:
    lanes = machine.lanes
    widths = [2 * lanes, 3 * lanes, 4 * lanes - 1, 5 * lanes + 3, 7 * lanes, 13 * lanes - 1]
    kernels = compiled({f"columns_{c}": lowered([9], 2 * lanes + 6, c, machine) for c in widths})
    for columns in widths:
        assert error_of(kernels[f"columns_{columns}"], [9], 2 * lanes + 6, columns, lanes) < LIMIT, columns


@pytest.mark.parametrize("depth", [512, 768, 2 * 3 * 131])
def test_chunks_of_the_depth(depth: int) -> None:
    """Sums are kept from one chunk to the next."""
    cases = {"blocks": (41, 48), "pairs_of_odd_number": (20, 40)}
    for machine in (SMALL, BETWEEN):
        for rows, columns in cases.values():
            assert division(rows, columns, depth, machine)[0].chunks > 1
        kernels = compiled({name: lowered([rows], depth, columns, machine) for name, (rows, columns) in cases.items()})
        for name, (rows, columns) in cases.items():
            assert error_of(kernels[name], [rows], depth, columns) < LIMIT, name


@pytest.mark.parametrize(
    ("lead", "calls"),
    [(["n", 17], [(1, 17), (3, 17), (0, 17)]), (["n", 4, 5], [(2, 4, 5)]), ([2, 3, 4], [(2, 3, 4)])],
    ids=str,
)
def test_a_free_size_before_constant_ones(lead: list[Any], calls: list[tuple[int, ...]]) -> None:
    sizes = [size(s) if isinstance(s, str) else s for s in lead]
    for machine in (a_machine(), SMALL):
        kernel = compiled({"kernel": lowered(sizes, 32, 40, machine)})["kernel"]
        for call in calls:
            assert error_of(kernel, call, 32, 40) < LIMIT, call


@examples(6)
@given(
    rows=st.integers(2, 70),
    depth=st.integers(17, 300),
    columns=st.integers(2, 12),
    beyond=st.integers(0, 15),
    machine=st.builds(
        a_machine, st.sampled_from((4, 8, 16)), st.integers(1, 4), st.sampled_from((256, 16 << 10, 512 << 10))
    ),
)
def test_any_product(rows: int, depth: int, columns: int, beyond: int, machine: Machine) -> None:
    wide = columns * machine.lanes + beyond
    kernel = compiled({"kernel": lowered([rows], 2 * depth, wide, machine)})["kernel"]
    assert error_of(kernel, [rows], 2 * depth, wide, machine.lanes) < LIMIT


def test_the_same_numbers_in_every_run() -> None:
    """Where halves and blocks overlap, an element is computed twice, and rounded differently: by one task, in order."""
    machine = a_machine(threads=2, l2=8 << 10)
    assert division(37, 88, 64, machine)[0].groups == 1 < division(37, 96, 64, machine)[0].groups
    kernel = compiled({"kernel": lowered([37], 64, 88, machine)})["kernel"]
    x, w = torch.randn(37, 64), quarters(torch.randn(88, 64), 8)
    rest = torch.from_numpy(BACK), torch.zeros(88), torch.zeros(37, 88)
    first = kernel(x, w, *rest, shape=(37, 88))
    assert all(torch.equal(kernel(x, w, *rest, shape=(37, 88)), first) for _ in range(50))


def test_sums_are_as_exact_as_claimed_for_deep_products() -> None:
    kernel = compiled({"kernel": lowered([64], 3072, 64, a_machine())})["kernel"]
    assert max(error_of(kernel, [64], 3072, 64) for _ in range(4)) < LIMIT


def test_the_quarters_give_the_matrix_back() -> None:
    w = torch.randn(88, 64, dtype=torch.float64)
    parts = torch.einsum("qi,pikl->qkpl", torch.from_numpy(BACK).double(), quarters(w, 8)).flatten(2)
    left, right = torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])
    assert relative_error(left, w.T[:, :48]) < 1e-15
    assert relative_error(right, w.T[:, 40:]) < 1e-15


def _spec() -> tuple[te.Tensor, te.Tensor, te.Tensor, te.Tensor]:
    x, w, back = operand(8, 16), operand(2, PRODUCTS, 8, 8, name="w"), operand(4, PRODUCTS, name="back")
    return x, w, back, strassen(x, w, back, 32)


def test_only_its_own_specification_is_taken() -> None:
    x, w, back, result = _spec()
    for name, taken in (("strassen", True), ("product", False), ("winograd", False)):

        def rule(fused: Fused, machine: Machine, name: str = name) -> Any:
            return strassen_kernel(replace(fused, notes={**fused.notes, "kernel": name}), machine)

        assert (apply(rule, a_machine(), [x, w, back], result) is not None) == taken, name


def test_what_follows_may_read_the_product_in_place_only() -> None:
    x, w, back, result = _spec()
    follows: dict[str, tuple[Callable[..., Any], bool]] = {
        "in place": (lambda i, j: result(i, j) * 2, True),
        "the first row": (lambda i, j: result(i, j) - result(0, j), False),
    }
    for name, (element, taken) in follows.items():
        last = te.compute((8, 32), element, name="last")
        assert (apply(strassen_kernel, a_machine(), [x, w, back], last) is not None) == taken, name


def test_the_specification_itself_is_the_product() -> None:
    """Without the kernel the function is slow, and right."""
    x, w, back, result = _spec()
    kernel = compiled({"kernel": te.create_prim_func([x, w, back, result], "int64")})["kernel"]
    data, weight = torch.randn(8, 16), torch.randn(32, 16)
    ours = kernel(data, quarters(weight, 8), torch.from_numpy(BACK), shape=(8, 32))
    assert relative_error(ours.double(), data.double() @ weight.double().T) < LIMIT


def test_the_model_takes_large_products_and_refuses_others() -> None:
    for lanes in (4, 8):
        machine = a_machine(lanes, threads=2)
        assert strassen_pays([197, 768], 768, 3072, machine)
        assert strassen_pays([size(), 197, 768], 768, 3072, machine)  # of each image
        refused = {
            "few rows": ([8, 768], 768, 3072),
            "rows of free number": ([size(), 768], 768, 3072),
            "short": ([3136, 64], 64, 256),
            "narrow": ([3136, 768], 768, 3 * lanes),
            "odd": ([197, 767], 767, 3072),
        }
        for name, (shape, depth, columns) in refused.items():
            assert not strassen_pays(shape, depth, columns, machine), name


def test_one_percent_is_seen() -> None:
    kernel = compiled({"kernel": lowered([6], 16, 32, a_machine())})["kernel"]
    assert error_of(kernel, [6], 16, 32, factor=1.01) > 1e-3
