"""Depthwise convolutions against float64: windows and borders, channels at and above whole vectors, blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tvm import te

from graphopt.backends.tvm.kernels.depthwise import depthwise, depthwise_kernel
from graphopt.backends.tvm.kernels.fused import Fused
from graphopt.backends.tvm.kernels.machine import Machine
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
from tests.backends.kernels.images import Geometry, channels_last, convolved
from tests.compare import relative_error

LIMIT = 2e-6
MACHINES = [a_machine(4), a_machine(16), a_machine(threads=2)]


@dataclass(frozen=True)
class Case:
    """relu(depthwise convolution + bias + residual)."""

    geometry: Geometry
    channels: int
    images: int = 1
    machine: Machine = field(default_factory=a_machine)

    def lowered(self, images: Any = None) -> Any:
        """The function; `images` is a free number of images when it is given."""
        images = self.images if images is None else images
        x = operand(images, *self.geometry.size, self.channels)
        w, bias = operand(*self.geometry.kernel, self.channels, name="w"), operand(self.channels, name="bias")
        residual = operand(images, *self.geometry.result, self.channels, name="residual")
        result = bias_residual_relu(depthwise(x, w, self.geometry.window), bias, residual)
        return apply(depthwise_kernel, self.machine, [x, w, bias, residual], result)

    def error(self, kernel: Library, factor: float = 1.0) -> float:
        """The error of a kernel, whose weight is multiplied by a factor."""
        x = torch.randn(self.images, self.channels, *self.geometry.size)
        weight = torch.randn(self.channels, 1, *self.geometry.kernel)
        shape = (self.images, *self.geometry.result, self.channels)
        bias, residual = torch.randn(self.channels), torch.randn(shape)
        packed = weight[:, 0].permute(1, 2, 0).contiguous() * factor
        ours = kernel(channels_last(x), packed, bias, residual, shape=shape)
        expected = (convolved(x, weight, self.geometry, self.channels) + bias + residual).relu()
        return relative_error(ours.double(), expected)


def check(cases: dict[str, Case]) -> None:
    """All cases in one library."""
    kernels = compiled({name: case.lowered() for name, case in cases.items()})
    errors = {name: case.error(kernels[name]) for name, case in cases.items()}
    assert all(error < LIMIT for error in errors.values()), {n: e for n, e in errors.items() if not e < LIMIT}


WINDOWS = {
    "one": Geometry((6, 5), (1, 1)),
    "three": Geometry((6, 7), (3, 3), before=(1, 1), after=(1, 1)),
    "five": Geometry((6, 8), (5, 5), before=(2, 2), after=(2, 2)),
    "seven": Geometry((7, 8), (3, 7), (2, 2), (1, 3), (1, 3)),
    "unpadded": Geometry((7, 8)),
    "stride_2": Geometry((8, 13), (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride_beyond_the_window": Geometry((10, 11), (1, 1), (3, 4)),
    "dilated": Geometry((9, 9), (3, 3), (1, 1), (2, 2), (2, 2), (2, 2)),
    "dilated_and_strided": Geometry((11, 12), (3, 3), (2, 3), (2, 1), (2, 1), (2, 3)),
    "only_before": Geometry((5, 6), (3, 3), before=(2, 1)),
    "only_left": Geometry((5, 6), (3, 3), before=(0, 2)),
    "narrower_than_the_window": Geometry((2, 2), (5, 5), before=(2, 2), after=(2, 2)),
    "padded_beyond_the_window": Geometry((3, 2), (3, 3), before=(4, 5), after=(5, 4)),
    "columns_of_padding_alone": Geometry((3, 1), (1, 2), (1, 7), (0, 3), (0, 9)),
    "one_pixel": Geometry((1, 1), (3, 3), before=(1, 1), after=(1, 1)),
}


def test_windows() -> None:
    check({name: Case(geometry, 11, images=2) for name, geometry in WINDOWS.items()})


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_channels_at_and_above_whole_vectors(machine: Machine) -> None:
    lanes = machine.lanes
    geometry = Geometry((5, 4), (2, 3), (1, 2), (1, 1), (0, 1))
    counts = (lanes, lanes + 1, 2 * lanes, 58)
    check({f"channels_{c}": Case(geometry, c, machine=machine) for c in counts})


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_channels_below_a_vector_are_refused(machine: Machine) -> None:
    geometry = Geometry((4, 4), (3, 3))
    for channels in (1, 2, 3, machine.lanes - 1):
        assert Case(geometry, channels, machine=machine).lowered() is None, channels
    assert Case(geometry, machine.lanes, machine=machine).lowered() is not None


@pytest.mark.parametrize("threads", [3, 16])
def test_rows_are_divided_among_threads(threads: int) -> None:
    machine = a_machine(threads=threads)
    heights = (1, 2, 7, 33)
    check(
        {
            f"rows_{rows}": Case(Geometry((rows, 3), (3, 1), before=(1, 0), after=(1, 0)), 8, machine=machine)
            for rows in heights
        }
    )


def test_a_free_number_of_images() -> None:
    for machine in (a_machine(), a_machine(threads=2)):
        padded = Case(Geometry((6, 5), before=(1, 1), after=(1, 1)), 19, machine=machine)
        cases = {"padded": padded, "bare": replace(padded, geometry=Geometry((6, 5)))}
        kernels = compiled({name: case.lowered(size()) for name, case in cases.items()})
        for name, case in cases.items():
            for images in (0, 1, 2, 5):
                assert replace(case, images=images).error(kernels[name]) < LIMIT, (name, images)


@st.composite
def geometries(draw: Callable[..., Any]) -> Geometry:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, dilation, before, after = pair(1, 4), pair(1, 3), pair(0, 3), pair(0, 3)
    least = [d * (k - 1) + 1 - b - a for k, d, b, a in zip(kernel, dilation, before, after, strict=True)]
    extra = pair(0, 9)
    rows, columns = (max(1, few) + more for few, more in zip(least, extra, strict=True))
    return Geometry((rows, columns), kernel, pair(1, 3), before, after, dilation)


@examples(6)
@given(
    geometry=geometries(),
    channels=st.integers(0, 40),
    images=st.integers(1, 3),
    machine=st.builds(a_machine, st.sampled_from((4, 8, 16)), st.integers(1, 4)),
)
def test_any_depthwise_convolution(geometry: Geometry, channels: int, images: int, machine: Machine) -> None:
    check({"kernel": Case(geometry, machine.lanes + channels, images, machine)})


def _spec(dtype: str = "float32") -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    x, w = operand(1, 8, 8, 8, dtype=dtype), operand(3, 3, 8, dtype=dtype, name="w")
    return x, w, depthwise(x, w, Geometry((8, 8), before=(1, 1), after=(1, 1)).window)


def test_only_float32_is_taken() -> None:
    for dtype, taken in (("float32", True), ("float64", False), ("float16", False), ("int32", False)):
        x, w, result = _spec(dtype)
        assert (apply(depthwise_kernel, a_machine(), [x, w], result) is not None) == taken, dtype


def test_only_depthwise_convolutions_are_taken() -> None:
    x, w, result = _spec()
    for name, taken in (("depthwise", True), ("product", False), ("convolution", False), ("reduction", False)):

        def rule(fused: Fused, machine: Machine, name: str = name) -> Any:
            return depthwise_kernel(replace(fused, notes={**fused.notes, "kernel": name}), machine)

        assert (apply(rule, a_machine(), [x, w], result) is not None) == taken, name


def test_what_follows_may_read_the_convolution_in_place_only() -> None:
    x, w, result = _spec()
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
        assert (apply(depthwise_kernel, a_machine(), [x, w, other], last) is not None) == taken, name


def test_a_sum_over_the_convolution_is_refused() -> None:
    x, w, result = _spec()
    k = te.reduce_axis((0, 8), "k")
    total = te.compute((1, 8, 8), lambda n, i, j: te.sum(result(n, i, j, k), axis=[k]), name="total")
    assert apply(depthwise_kernel, a_machine(), [x, w], total) is None


def test_one_percent_is_seen() -> None:
    case = Case(Geometry((5, 6), before=(1, 1), after=(1, 1)), 11)
    assert case.error(compiled({"kernel": case.lowered()})["kernel"], 1.01) > 1e-3
