"""How results are cut into register tiles, by what the processor does in a cycle."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.backends.tvm.kernels.choices import Choices
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.tile import Parts, best_tile, cycles_of
from graphopt.target import Target
from tests.backends.kernels.building import a_machine, examples

ONE, TWO = a_machine(16, multiply_adds=1), a_machine(16, multiply_adds=2)


def whole(parts: Parts) -> int:
    return sum(size * count for size, count, _ in parts.sizes)


@pytest.mark.parametrize(
    ("name", "multiply_adds"), [("znver4", 1), ("skylake-avx512", 2), ("x86-64-v4", 2), ("znver3", 2), ("arm64", 2)]
)
def test_only_zen_4_does_one_multiply_add_in_a_cycle(name: str, multiply_adds: int) -> None:
    assert Machine.of(Target.parse(name), 1).multiply_adds == multiply_adds


@pytest.mark.parametrize(("cpu", "multiply_adds"), [("znver4", 1), ("znver5", 2), ("sapphirerapids", 2)])
def test_it_is_told_from_the_extensions(cpu: str, multiply_adds: int) -> None:
    target = replace(Target.parse("x86-64-v4"), cpu="x86-64-v4", features=tuple(sorted(_features(cpu))))
    assert Machine.of(target, 1).multiply_adds == multiply_adds


def _features(cpu: str) -> frozenset[str]:
    from graphopt.cpus import features_of

    return features_of("x86_64", cpu)


def test_one_multiply_add_in_a_cycle_makes_tiles_of_one_vector() -> None:
    assert best_tile(64, 12, ONE) == (Parts.of(64, 10), Parts.of(12, 1))
    assert best_tile(49, 128, ONE) == (Parts.of(49, 10), Parts.of(128, 1))
    rows, vectors = best_tile(64, 12, TWO)
    assert vectors.size > 1
    assert rows.size * vectors.size >= 8


def test_few_rows_get_as_many_vectors_as_hide_the_latency_of_a_sum() -> None:
    rows, vectors = best_tile(1, 64, ONE)
    assert (rows.size, vectors.size) == (1, 4)
    rows, vectors = best_tile(2, 64, ONE)
    assert (rows.size, vectors.size) == (2, 2)


def test_what_was_measured_goes_before_the_model() -> None:
    told = replace(ONE, choices=Choices(tile=(6, 4)))
    assert best_tile(64, 12, told) == (Parts.of(64, 6), Parts.of(12, 4))


@examples(200)
@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.sampled_from([1, 2]))
def test_any_cut_is_whole_fits_the_registers_and_takes_no_longer_than_single_rows(
    rows: int, vectors: int, lanes: int, multiply_adds: int
) -> None:
    machine = a_machine(lanes, multiply_adds=multiply_adds)
    cut = best_tile(rows, vectors, machine)
    assert (whole(cut[0]), whole(cut[1])) == (rows, vectors)
    tall, wide = cut[0].size, cut[1].size
    assert tall * wide + wide + 1 <= machine.registers
    assert cycles_of(*cut, machine) <= cycles_of(Parts.of(rows, 1), Parts.of(vectors, 1), machine)


@pytest.mark.parametrize(
    ("columns", "lanes"), [(3, 8), (8, 8), (12, 8), (16, 16), (24, 8), (32, 16), (40, 8), (56, 8), (104, 16), (208, 16)]
)
def test_half_vectors_leave_no_lanes_empty_where_a_vector_is_two_halves_anyway(columns: int, lanes: int) -> None:
    assert ONE.lanes_for(columns) == lanes
    assert TWO.lanes_for(columns) == 16 and a_machine(8).lanes_for(columns) == 8


def test_twice_as_many_half_vectors_are_computed_in_a_cycle() -> None:
    half = ONE.of_lanes(8)
    assert (half.lanes, half.multiply_adds, half.registers) == (8, 2, ONE.registers)
    assert ONE.of_lanes(16) is ONE


@given(columns=st.integers(1, 300))
def test_half_vectors_never_take_longer(columns: int) -> None:
    half = ONE.of_lanes(ONE.lanes_for(columns))
    assert -(-columns // half.lanes) / half.multiply_adds <= -(-columns // ONE.lanes) / ONE.multiply_adds
