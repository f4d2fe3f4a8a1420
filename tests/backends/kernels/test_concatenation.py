"""Concatenation, which copies: every axis, widths below and above vectors, dtypes, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.concatenation import concatenation, concatenation_kernel
from graphopt.backends.tvm.kernels.fused import Fused
from graphopt.backends.tvm.kernels.machine import Machine
from tests.backends.kernels.building import a_machine, apply, bias_residual_relu, compiled, examples, operand, size
from tests.backends.kernels.typed import TypedLibrary, compiled_typed
from tests.compare import relative_error

Shapes = Sequence[Sequence[Any]]


def lowered(shapes: Shapes, axis: int, machine: Machine, dtype: str = "float32") -> Any:
    tensors = [operand(*shape, dtype=dtype, name=f"x{i}") for i, shape in enumerate(shapes)]
    return apply(concatenation_kernel, machine, tensors, concatenation(tensors, axis))


def numbers(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(*shape).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, tuple(shape)).to(dtype)


def is_right(kernel: TypedLibrary, shapes: Shapes, axis: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether every element is where it belongs, bit by bit."""
    tensors = [numbers(shape, dtype) for shape in shapes]
    expected = torch.cat(tensors, axis)
    return torch.equal(kernel(tensors, expected.shape, dtype), expected)


def along(axis: int, lengths: Sequence[int], others: Sequence[int]) -> list[list[int]]:
    """Shapes of these lengths along the axis, and the other sizes around it."""
    return [[*others[:axis], length, *others[axis:]] for length in lengths]


@pytest.mark.parametrize("lanes", [4, 16])
def test_every_axis_but_the_first(lanes: int) -> None:
    cases = {
        f"axis_{axis}_of_{len(others) + 1}": (along(axis, (3, 1, 2), others), axis)
        for others in ([2], [2, 5], [2, 3, 9], [1, 2, 3, 17])
        for axis in range(1, len(others) + 1)
    }
    kernels = compiled_typed({name: lowered(*case, a_machine(lanes)) for name, case in cases.items()})
    for name, case in cases.items():
        assert is_right(kernels[name], *case), name


@pytest.mark.parametrize("lanes", [4, 16])
def test_widths_below_at_and_above_whole_vectors(lanes: int) -> None:
    """Odd widths beside whole ones: each input has its own, and none may reach into the next."""
    widths = {
        "below": (1, 2, lanes - 1),
        "whole": (lanes, 2 * lanes, lanes),
        "above": (lanes + 1, 2 * lanes - 1, 1),
        "one": (1, 1),
        "single": (lanes + 3,),
        "many": tuple(range(1, 12)),
    }
    kernels = compiled_typed({n: lowered(along(2, w, [2, 3]), 2, a_machine(lanes)) for n, w in widths.items()})
    for name, lengths in widths.items():
        assert is_right(kernels[name], along(2, lengths, [2, 3]), 2), name


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_dtypes(dtype: str) -> None:
    cases = {"last": (along(2, (3, 17, 8), [2, 2]), 2), "middle": (along(1, (3, 1), [2, 9]), 1)}
    kernels = compiled_typed({name: lowered(*case, a_machine(), dtype) for name, case in cases.items()})
    for name, case in cases.items():
        assert is_right(kernels[name], *case, getattr(torch, dtype)), name


def test_a_free_first_size() -> None:
    free = size()
    cases = {"last": ((3, 17), 2), "middle": ((2, 1), 1)}
    kernels = compiled_typed(
        {n: lowered(along(axis, lengths, [free, 9]), axis, a_machine()) for n, (lengths, axis) in cases.items()}
    )
    for name, (lengths, axis) in cases.items():
        for rows in (0, 1, 2, 7):
            assert is_right(kernels[name], along(axis, lengths, [rows, 9]), axis), (name, rows)


def test_inputs_without_elements() -> None:
    cases = {"last": (along(2, (3, 0, 9), [2, 3]), 2), "middle": (along(1, (0, 2), [2, 9]), 1)}
    kernels = compiled_typed({name: lowered(*case, a_machine()) for name, case in cases.items()})
    for name, case in cases.items():
        assert is_right(kernels[name], *case), name


@examples(8)
@given(
    others=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    place=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    lanes=st.sampled_from((4, 8, 16)),
    dtype=st.sampled_from(("float32", "float64", "int64", "int8", "bool")),
)
def test_any_concatenation(others: list[int], place: int, lengths: list[int], lanes: int, dtype: str) -> None:
    axis = 1 + place % len(others)
    shapes = along(axis, lengths, others)
    kernel = compiled_typed({"kernel": lowered(shapes, axis, a_machine(lanes), dtype)})["kernel"]
    assert is_right(kernel, shapes, axis, getattr(torch, dtype))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_what_follows_is_computed_on_the_way(axis: int) -> None:
    shapes = along(axis, (3, 8, 1), [2, 5, 11])
    tensors = [operand(*shape, name=f"x{i}") for i, shape in enumerate(shapes)]
    whole = concatenation(tensors, axis)
    bias, residual = operand(whole.shape[-1], name="bias"), operand(*whole.shape, name="residual")
    operands = [*tensors, bias, residual]
    function = apply(concatenation_kernel, a_machine(), operands, bias_residual_relu(whole, bias, residual))
    values = [torch.randn(*shape) for shape in shapes]
    joined = torch.cat(values, axis).double()
    b, r = torch.randn(joined.shape[-1]), torch.randn(joined.shape)
    ours = compiled({"kernel": function})["kernel"](*values, b, r, shape=joined.shape)
    assert relative_error(ours.double(), (joined + b + r).relu()) < 1e-6
    assert relative_error((ours * 1.01).double(), (joined + b + r).relu()) > 1e-3


def test_what_follows_may_be_of_another_dtype() -> None:
    tensors = [operand(2, 3, dtype="int32", name="x"), operand(2, 9, dtype="int32", name="y")]
    whole = concatenation(tensors, 1)
    halves = te.compute((2, 12), lambda i, j: tirx.Cast("float32", whole(i, j)) / 2, name="halves")
    kernel = compiled_typed({"kernel": apply(concatenation_kernel, a_machine(), tensors, halves)})["kernel"]
    values = [numbers([2, 3], torch.int32), numbers([2, 9], torch.int32)]
    assert torch.equal(kernel(values, (2, 12), torch.float32), torch.cat(values, 1) / 2)


def test_what_follows_may_read_an_input_too() -> None:
    x, y = operand(2, 8, name="x"), operand(2, 8, name="y")
    whole = concatenation([x, y], 1)
    last = te.compute((2, 16), lambda i, j: whole(i, j) + x(i, tirx.floormod(j, 8)), name="last")
    kernel = compiled({"kernel": apply(concatenation_kernel, a_machine(), [x, y], last)})["kernel"]
    a, b = torch.randn(2, 8), torch.randn(2, 8)
    assert torch.equal(kernel(a, b, shape=(2, 16)), torch.cat([a, b], 1) + torch.cat([a, a], 1))


@pytest.mark.parametrize("places", [(0, 0), (0, 1, 0), (0, 1, 1)], ids=str)
def test_an_input_may_be_there_twice(places: tuple[int, ...]) -> None:
    """Refused, or right."""
    different = [operand(2, 3, name="x"), operand(2, 3, name="y")][: max(places) + 1]
    function = apply(concatenation_kernel, a_machine(), different, concatenation([different[p] for p in places], 1))
    values = [torch.randn(2, 3) for _ in different]
    expected = torch.cat([values[p] for p in places], 1)
    if function is not None:
        ours = compiled_typed({"kernel": function})["kernel"](values, expected.shape, torch.float32)
        assert torch.equal(ours, expected)


def test_the_first_axis_is_refused_and_the_others_are_not() -> None:
    for axis, taken in ((0, False), (1, True), (2, True)):
        assert (lowered(along(axis, (3, 8), [8, 8]), axis, a_machine()) is not None) == taken, axis
    assert lowered([[3], [8]], 0, a_machine()) is None


def test_free_sizes_are_refused_but_for_the_first() -> None:
    free = size()
    for position, taken in ((0, True), (1, False), (2, False)):
        shapes = along(1, (3, 8), [8, 8])
        for shape in shapes:
            shape[position] = free
        assert (lowered(shapes, 1, a_machine()) is not None) == taken, position


def test_inputs_of_different_dtypes_are_refused() -> None:
    for second, taken in (("float32", True), ("float64", False)):
        x, y = operand(2, 8, name="x"), operand(2, 8, dtype=second, name="y")

        def element(i: Any, j: Any, x: te.Tensor, y: te.Tensor) -> Any:
            return tirx.if_then_else(j < 8, x(i, j), tirx.Cast("float32", y(i, j - 8)))

        notes = {"graphopt.kernel": "concatenation", "graphopt.axis": 1}
        whole = te.compute((2, 16), _between(element, x, y), name="concatenation", attrs=notes)
        assert (apply(concatenation_kernel, a_machine(), [x, y], whole) is not None) == taken, second


def _between(element: Callable[..., Any], x: te.Tensor, y: te.Tensor) -> Callable[..., Any]:
    return lambda *at: element(*at, x, y)


def test_only_concatenations_are_taken() -> None:
    tensors = [operand(2, 8, name="x"), operand(2, 8, name="y")]
    for name, taken in (("concatenation", True), ("product", False), ("reduction", False), ("convolution", False)):

        def rule(fused: Fused, machine: Machine, name: str = name) -> Any:
            return concatenation_kernel(replace(fused, notes={**fused.notes, "kernel": name}), machine)

        assert (apply(rule, a_machine(), tensors, concatenation(tensors, 1)) is not None) == taken, name


def test_what_follows_may_read_the_whole_in_place_only() -> None:
    tensors = [operand(2, 8, 8, name="x"), operand(2, 8, 8, name="y")]
    whole = concatenation(tensors, 1)
    other = operand(2, 8, 16, name="other")
    follows: dict[str, tuple[Callable[..., Any], bool]] = {
        "in place": (lambda n, i, j: whole(n, i, j) * 2, True),
        "another tensor turned": (lambda n, i, j: whole(n, i, j) + other(n, j, i), True),
        "moved": (lambda n, i, j: whole(n, tirx.min(i + 1, 15), j), False),
        "in place and the first row": (lambda n, i, j: whole(n, i, j) - whole(n, 0, j), False),
    }
    for name, (element, taken) in follows.items():
        last = te.compute((2, 16, 8), element, name="last")
        assert (apply(concatenation_kernel, a_machine(), [*tensors, other], last) is not None) == taken, name


def test_one_percent_and_one_place_are_seen() -> None:
    shapes = along(1, (3, 9), [2])
    kernel = compiled_typed({"kernel": lowered(shapes, 1, a_machine())})["kernel"]
    values = [torch.randn(*shape) for shape in shapes]
    ours = kernel([values[0] * 1.01, values[1]], (2, 12), torch.float32)
    assert relative_error(ours, torch.cat(values, 1)) > 1e-3
    assert not torch.equal(kernel([values[0], values[1].roll(1, 1)], (2, 12), torch.float32), torch.cat(values, 1))
