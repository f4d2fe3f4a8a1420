"""Winograd's convolution against float64: both squares, borders, channels, divisions; and when the model takes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tvm import te

from graphopt.backends.tvm.kernels.fused import Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import packed_vectors
from graphopt.backends.tvm.kernels.transforms import SQUARES
from graphopt.backends.tvm.kernels.winograd import best_square, transformed_weight, winograd, winograd_kernel
from tests.backends.kernels.building import (
    Library,
    a_machine,
    apply,
    bias_residual_relu,
    compiled,
    examples,
    operand,
    packed,
    size,
)
from tests.backends.kernels.images import Geometry, channels_last, convolved
from tests.compare import relative_error

LIMIT = {2: 2e-6, 4: 2e-5}
"""What the module claims for squares of four; squares of two are as exact as the direct form, within its limit."""

SMALL = a_machine(threads=2, l2=1 << 10)
"""A cache so small that few squares fit, and two threads: the channels are divided too."""


def image(rows: int, columns: int, border: int = 1) -> Geometry:
    return Geometry((rows, columns), (3, 3), (1, 1), (border, border), (border, border))


@dataclass(frozen=True)
class Case:
    """relu(convolution + bias + residual)."""

    m: int
    geometry: Geometry
    inputs: int = 8
    outputs: int = 8
    images: int = 1
    machine: Machine = field(default_factory=a_machine)

    @property
    def lanes(self) -> int:
        return self.machine.lanes_for(self.outputs)

    def lowered(self, images: Any = None) -> Any:
        """The function; `images` is a free number of images when it is given."""
        images = self.images if images is None else images
        vectors = len(packed_vectors(self.outputs, self.lanes))
        x = operand(images, *self.geometry.size, self.inputs)
        w = operand((self.m + 2) ** 2, vectors, self.inputs, self.lanes, name="w")
        back, bias = operand(3, self.m + 2, name="back"), operand(self.outputs, name="bias")
        residual = operand(images, *self.geometry.result, self.outputs, name="residual")
        result = bias_residual_relu(winograd(x, w, back, self.outputs, self.m, self.geometry.window), bias, residual)
        return apply(winograd_kernel, self.machine, [x, w, back, bias, residual], result)

    def error(self, kernel: Library, factor: float = 1.0) -> float:
        """The error of a kernel, whose image is multiplied by a factor."""
        x = torch.randn(self.images, self.inputs, *self.geometry.size)
        weight = torch.randn(self.outputs, self.inputs, 3, 3)
        shape = (self.images, *self.geometry.result, self.outputs)
        bias, residual = torch.randn(self.outputs), torch.randn(shape)
        lanes = self.lanes
        turned = torch.stack([packed(position, 1, lanes) for position in transformed_weight(weight, self.m)])
        back = torch.from_numpy(SQUARES[self.m].back).float()
        ours = kernel(channels_last(x) * factor, turned, back, bias, residual, shape=shape)
        return relative_error(ours.double(), (convolved(x, weight, self.geometry) + bias + residual).relu())


def check(cases: dict[str, Case]) -> None:
    """All cases in one library."""
    kernels = compiled({name: case.lowered() for name, case in cases.items()})
    errors = {name: case.error(kernels[name]) for name, case in cases.items()}
    wrong = {name: error for name, error in errors.items() if not error < LIMIT[cases[name].m]}
    assert not wrong, wrong


@pytest.mark.parametrize("m", [2, 4])
def test_sizes_and_borders(m: int) -> None:
    geometries = {
        "whole_squares": image(2 * m, 3 * m),
        "one_more": image(m + 1, 2 * m + 1),
        "bare": image(m + 3, m + 2, border=0),
        "wide_border": image(1, 2, border=3),
        "only_before": Geometry((4, 5), before=(2, 1)),
    }
    check({name: Case(m, geometry, images=2) for name, geometry in geometries.items()})


@pytest.mark.parametrize(
    "machine",
    [a_machine(4), a_machine(16), a_machine(16, multiply_adds=1), SMALL],
    ids=["four", "sixteen", "narrow", "small"],
)
def test_channels_at_and_above_whole_vectors(machine: Machine) -> None:
    lanes = machine.lanes
    counts = [(2, 58, 24), (4, lanes + 3, lanes + 1)]
    check({f"square_{m}_from_{i}_to_{o}": Case(m, image(5, 6), i, o, machine=machine) for m, i, o in counts})


@pytest.mark.parametrize("m", [2, 4])
def test_a_free_number_of_images(m: int) -> None:
    case = Case(m, image(5, 3), 11, 19, machine=a_machine() if m == 2 else SMALL)
    kernel = compiled({"kernel": case.lowered(size())})["kernel"]
    for images in (0, 1, 2, 5):
        assert replace(case, images=images).error(kernel) < LIMIT[m], images


@pytest.mark.parametrize(
    ("m", "inputs"),
    [
        (2, 256),
        (4, 32),
        (4, 256),
    ],
)
def test_images_of_numbers_of_any_sign_and_of_one_stay_within_the_claim(m: int, inputs: int) -> None:
    case = Case(m, image(8, 8), inputs, 16)
    kernel = compiled({"kernel": case.lowered()})["kernel"]
    assert max(case.error(kernel) for _ in range(8)) < LIMIT[m]
    x, weight = torch.rand(1, inputs, 8, 8), torch.randn(16, inputs, 3, 3)
    turned = torch.stack([packed(position, 1, 8) for position in transformed_weight(weight, m)])
    back, shape = torch.from_numpy(SQUARES[m].back).float(), (1, 8, 8, 16)
    ours = kernel(channels_last(x), turned, back, torch.zeros(16), torch.zeros(shape), shape=shape)
    assert relative_error(ours.double(), convolved(x, weight, case.geometry).relu()) < LIMIT[m]


@examples(2)
@given(
    m=st.sampled_from((2, 4)),
    sizes=st.tuples(st.integers(3, 14), st.integers(3, 14)),
    before=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    after=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    beyond=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    images=st.integers(1, 3),
    machine=st.builds(
        a_machine, st.sampled_from((4, 8, 16)), st.integers(1, 4), st.sampled_from((64, 8192, 512 << 10))
    ),
)
def test_any_winograd_convolution(
    m: int,
    sizes: tuple[int, int],
    before: tuple[int, int],
    after: tuple[int, int],
    beyond: tuple[int, int],
    images: int,
    machine: Machine,
) -> None:
    geometry = Geometry(sizes, before=before, after=after)
    inputs, outputs = (machine.lanes + more for more in beyond)
    check({"kernel": Case(m, geometry, inputs, outputs, images, machine)})


def _spec() -> tuple[te.Tensor, te.Tensor, te.Tensor, te.Tensor]:
    x, w, back = operand(1, 8, 8, 8), operand(16, 1, 8, 8, name="w"), operand(3, 4, name="back")
    return x, w, back, winograd(x, w, back, 8, 2, image(8, 8).window)


def test_only_its_own_specification_is_taken() -> None:
    x, w, back, result = _spec()
    for name, taken in (("winograd", True), ("product", False), ("convolution", False), ("depthwise", False)):

        def rule(fused: Fused, machine: Machine, name: str = name) -> Any:
            return winograd_kernel(replace(fused, notes={**fused.notes, "kernel": name}), machine)

        assert (apply(rule, a_machine(), [x, w, back], result) is not None) == taken, name


def test_what_follows_may_read_the_convolution_in_place_only() -> None:
    x, w, back, result = _spec()
    other = operand(1, 8, 8, 8, name="other")
    follows: dict[str, tuple[Callable[..., Any], bool]] = {
        "in place": (lambda n, i, j, c: result(n, i, j, c) * 2, True),
        "another tensor turned": (lambda n, i, j, c: result(n, i, j, c) + other(n, j, i, c), True),
        "turned": (lambda n, i, j, c: result(n, j, i, c), False),
        "channels turned": (lambda n, i, j, c: result(n, i, c, j), False),
        "in place and turned": (lambda n, i, j, c: result(n, i, j, c) + result(n, j, i, c), False),
        "the first row": (lambda n, i, j, c: result(n, i, j, c) - result(n, 0, j, c), False),
    }
    for name, (element, taken) in follows.items():
        last = te.compute((1, 8, 8, 8), element, name="last")
        assert (apply(winograd_kernel, a_machine(), [x, w, back, other], last) is not None) == taken, name


def test_the_specification_itself_is_the_convolution() -> None:
    """Without the kernel the function is slow, and right."""
    x, w, back, result = _spec()
    kernel = compiled({"kernel": te.create_prim_func([x, w, back, result], "int64")})["kernel"]
    data, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    turned = torch.stack([packed(position, 1, 8) for position in transformed_weight(weight, 2)])
    ours = kernel(channels_last(data), turned, torch.from_numpy(SQUARES[2].back).float(), shape=(1, 8, 8, 8))
    assert relative_error(ours.double(), convolved(data, weight, image(8, 8))) < LIMIT[2]


def test_the_model_takes_large_images_with_many_channels() -> None:
    for lanes in (4, 8, 16):
        assert best_square(image(56, 56).window, 128, 128, a_machine(lanes)) == 4
        assert best_square(image(2, 2).window, 128, 128, a_machine(lanes)) in (0, 2)


def test_the_model_refuses_few_channels_on_either_side() -> None:
    for lanes in (4, 8, 16):
        machine, window, enough = a_machine(lanes), image(112, 112).window, min(2 * lanes, 16)
        for few in (1, 3, lanes // 2, enough - 1):
            assert best_square(window, few, 512, machine) == 0, few
            assert best_square(window, 512, few, machine) == 0, few
        assert best_square(window, 512, enough, machine) != 0
        assert best_square(window, enough, 512, machine) != 0


def test_the_model_refuses_images_so_small_that_the_weights_decide() -> None:
    for lanes in (4, 8, 16):
        for channels in (64, 256, 1024):
            assert best_square(image(1, 1).window, channels, channels, a_machine(lanes)) == 0
            assert best_square(image(1, 2).window, channels, channels, a_machine(lanes)) == 0


@examples(300)
@given(
    rows=st.integers(1, 64),
    columns=st.integers(1, 64),
    inputs=st.integers(1, 600),
    outputs=st.integers(1, 600),
    lanes=st.sampled_from((4, 8, 16)),
)
def test_the_model_takes_only_what_saves_multiplications(
    rows: int, columns: int, inputs: int, outputs: int, lanes: int
) -> None:
    m = best_square(image(rows, columns).window, inputs, outputs, a_machine(lanes))
    assert m in (0, *SQUARES)
    if m:
        squares = math.ceil(rows / m) * math.ceil(columns / m)
        assert squares * (m + 2) ** 2 < 9 * rows * columns
        assert min(inputs, outputs) >= min(2 * lanes, 16)


@pytest.mark.parametrize("m", [2, 4])
def test_one_percent_is_seen(m: int) -> None:
    case = Case(m, image(5, 6))
    assert case.error(compiled({"kernel": case.lowered()})["kernel"], 1.01) > 1e-3
