"""Direct convolutions against float64: windows, groups, widths of vectors, blocks of rows and of channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import tvm_ffi
from hypothesis import given
from hypothesis import strategies as st
from tvm import te, tirx

from graphopt.backends.tvm.kernels.convolution import convolution, convolution_kernel
from graphopt.backends.tvm.kernels.fused import Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import packed_vectors
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
from tests.backends.kernels.images import Geometry, channels_last, convolved
from tests.compare import relative_error

LIMIT = 2e-6
BLOCKS = a_machine(threads=2, l2=256)
"""A cache so small that a task has one row, and two threads: the channels are divided too."""

MACHINES = [a_machine(4), a_machine(16), a_machine(16, multiply_adds=1), BLOCKS]


@dataclass(frozen=True)
class Case:
    """relu(convolution + bias + residual)."""

    geometry: Geometry
    inputs: int
    outputs: int
    groups: int = 1
    images: int = 1
    order: str = "NHWC"
    machine: Machine = field(default_factory=a_machine)

    @property
    def lanes(self) -> int:
        return self.machine.lanes_for(self.outputs // self.groups)

    def lowered(self, images: Any = None) -> Any:
        """The function; `images` is a free number of images when it is given."""
        images = self.images if images is None else images
        vectors = self.groups * len(packed_vectors(self.outputs // self.groups, self.lanes))
        height, width = self.geometry.size
        x = operand(images, *((self.inputs, height, width) if self.order == "NCHW" else (height, width, self.inputs)))
        w = operand(vectors, *self.geometry.kernel, self.inputs // self.groups, self.lanes, name="w")
        bias = operand(self.outputs, name="bias")
        residual = operand(images, *self.geometry.result, self.outputs, name="residual")
        result = convolution(x, w, self.outputs, self.groups, self.geometry.window, self.order)
        return apply(
            convolution_kernel, self.machine, [x, w, bias, residual], bias_residual_relu(result, bias, residual)
        )

    def error(self, kernel: Library, factor: float = 1.0) -> float:
        """The error of a kernel, whose image is multiplied by a factor."""
        x = torch.randn(self.images, self.inputs, *self.geometry.size)
        weight = torch.randn(self.outputs, self.inputs // self.groups, *self.geometry.kernel)
        shape = (self.images, *self.geometry.result, self.outputs)
        bias, residual = torch.randn(self.outputs), torch.randn(shape)
        ours = kernel(
            (x if self.order == "NCHW" else channels_last(x)) * factor,
            packed(weight.permute(0, 2, 3, 1), self.groups, self.lanes),
            bias,
            residual,
            shape=shape,
        )
        expected = (convolved(x, weight, self.geometry, self.groups) + bias + residual).relu()
        return relative_error(ours.double(), expected)


def check(cases: dict[str, Case]) -> None:
    """All cases in one library."""
    kernels = compiled({name: case.lowered() for name, case in cases.items()})
    errors = {name: case.error(kernels[name]) for name, case in cases.items()}
    assert all(error < LIMIT for error in errors.values()), {n: e for n, e in errors.items() if not e < LIMIT}


WINDOWS = {
    "one": Geometry((6, 5), (1, 1)),
    "row": Geometry((6, 7), (1, 3), before=(0, 1), after=(0, 1)),
    "three": Geometry((6, 7), (3, 3), before=(1, 1), after=(1, 1)),
    "five": Geometry((8, 9), (5, 5), before=(2, 2), after=(2, 2)),
    "seven": Geometry((7, 8), (7, 7), (2, 2), (3, 3), (3, 3)),
    "unpadded": Geometry((7, 8)),
    "whole_image": Geometry((5, 4), (5, 4)),
    "stride_2": Geometry((8, 9), (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride_beyond_the_window": Geometry((10, 11), (1, 1), (3, 4)),
    "rows_left_over": Geometry((10, 10), (3, 3), (4, 4)),
    "dilated": Geometry((9, 9), (3, 3), (1, 1), (2, 2), (2, 2), (2, 2)),
    "dilated_down": Geometry((9, 6), (3, 2), (1, 1), (1, 0), (2, 0), (3, 1)),
    "dilated_across": Geometry((6, 9), (2, 3), (1, 1), (0, 1), (0, 2), (1, 3)),
    "dilated_and_strided": Geometry((11, 12), (3, 3), (2, 3), (2, 1), (2, 1), (2, 3)),
    "same_before": Geometry((6, 6), (4, 4), before=(2, 2), after=(1, 1)),
    "only_left": Geometry((5, 6), (3, 3), before=(0, 2)),
    "only_below": Geometry((5, 6), (3, 3), after=(2, 0)),
    "padded_beyond_the_window": Geometry((3, 2), (3, 3), before=(4, 5), after=(5, 4)),
    "one_pixel": Geometry((1, 1), (3, 3), before=(1, 1), after=(1, 1)),
    "one_column": Geometry((9, 1), (3, 1), before=(1, 0), after=(1, 0)),
}


def test_windows() -> None:
    check({name: Case(geometry, 5, 11, images=2) for name, geometry in WINDOWS.items()})


def test_windows_in_blocks() -> None:
    names = ("row", "rows_left_over", "dilated_and_strided", "only_below")
    check({name: Case(WINDOWS[name], 5, 19, images=2, machine=BLOCKS) for name in names})


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_channels_that_fill_vectors_and_do_not(machine: Machine) -> None:
    counts = [(1, 24), (2, 3), (3, 2), (24, 1), (58, 58)]
    geometry = Geometry((4, 5), (3, 3), (2, 1), (1, 1), (1, 1))
    check({f"from_{i}_to_{o}": Case(geometry, i, o, machine=machine) for i, o in counts})


@pytest.mark.parametrize("machine", [a_machine(4), BLOCKS, a_machine(16, multiply_adds=1)], ids=str)
def test_groups(machine: Machine) -> None:
    padded, bare = Geometry((5, 4), (3, 3), before=(1, 1), after=(1, 1)), Geometry((5, 4), (2, 3))
    counts = [(2, 6, 22), (3, 24, 58 * 3), (8, 16, 8), (4, 4, 68), (4, 32, 32), (2, 48, 48)]
    check(
        {
            f"groups_{groups}_from_{i}_to_{o}": Case(padded if n % 2 else bare, i, o, groups, machine=machine)
            for n, (groups, i, o) in enumerate(counts)
        }
    )


def test_groups_whose_rows_lie_apart() -> None:
    """Copied rows are sorted by group: windows that jump, that are dilated, and that look at nothing but zeros."""
    names = (
        "stride_2",
        "rows_left_over",
        "dilated_and_strided",
        "same_before",
        "only_left",
        "padded_beyond_the_window",
    )
    for machine in (a_machine(8), a_machine(8, 2, 4 << 10)):
        check({name: Case(WINDOWS[name], 3 * 5, 3 * 8, 3, images=2, machine=machine) for name in names})


@pytest.mark.parametrize("machine", [a_machine(16), a_machine(16, multiply_adds=1), BLOCKS], ids=str)
def test_a_first_layer_reads_its_image_channel_by_channel(machine: Machine) -> None:
    cases = {
        "stem": (3, Geometry((13, 12), (7, 7), (2, 2), (3, 3), (3, 3))),
        "small": (1, Geometry((6, 7), (3, 3), before=(1, 0), after=(0, 1))),
        "bare": (4, Geometry((6, 7), (2, 2), (2, 2))),
        "one": (2, Geometry((4, 3), (1, 1))),
    }
    check(
        {
            name: Case(geometry, inputs, 10, images=2, order="NCHW", machine=machine)
            for name, (inputs, geometry) in cases.items()
        }
    )


def test_the_order_of_axes_matters() -> None:
    geometry = Geometry((4, 4), (3, 3), before=(1, 1), after=(1, 1))
    right, wrong = Case(geometry, 4, 8, order="NCHW"), Case(geometry, 4, 8, order="NHWC")
    kernel = compiled({"kernel": right.lowered()})["kernel"]
    assert right.error(kernel) < LIMIT
    assert wrong.error(kernel) > 1e-2


@pytest.mark.parametrize("machine", [a_machine(), BLOCKS], ids=str)
def test_a_free_number_of_images(machine: Machine) -> None:
    padded, bare = Geometry((6, 5), before=(1, 1), after=(1, 1)), Geometry((6, 5))
    cases = {
        "padded": Case(padded, 6, 19, machine=machine),
        "bare": Case(bare, 6, 19, machine=machine),
        "grouped": Case(padded, 6, 22, 2, machine=machine),
        "first": Case(padded, 3, 19, order="NCHW", machine=machine),
    }
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
    extra = pair(0, 6)
    rows, columns = (max(1, few) + more for few, more in zip(least, extra, strict=True))
    return Geometry((rows, columns), kernel, pair(1, 3), before, after, dilation)


@examples(6)
@given(
    geometry=geometries(),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    images=st.integers(1, 3),
    order=st.sampled_from(("NHWC", "NCHW")),
    machine=st.builds(
        a_machine,
        st.sampled_from((4, 8, 16)),
        st.integers(1, 4),
        st.sampled_from((64, 4096, 512 << 10)),
        st.sampled_from((1, 2)),
    ),
)
def test_any_convolution(
    geometry: Geometry, groups: int, per_group: tuple[int, int], images: int, order: str, machine: Machine
) -> None:
    inputs, outputs = per_group
    check({"kernel": Case(geometry, inputs * groups, outputs * groups, groups, images, order, machine)})


def _spec(dtype: str = "float32") -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    x, w = operand(1, 8, 8, 4, dtype=dtype), operand(1, 3, 3, 4, 8, dtype=dtype, name="w")
    return x, w, convolution(x, w, 8, 1, Geometry((8, 8), before=(1, 1), after=(1, 1)).window)


def test_only_float32_is_taken() -> None:
    for dtype, taken in (("float32", True), ("float64", False), ("float16", False), ("int32", False)):
        x, w, result = _spec(dtype)
        assert (apply(convolution_kernel, a_machine(), [x, w], result) is not None) == taken, dtype


def test_only_convolutions_are_taken() -> None:
    x, w, result = _spec()
    for name, taken in (("convolution", True), ("product", False), ("depthwise", False), ("reduction", False)):

        def rule(fused: Fused, machine: Machine, name: str = name) -> Any:
            return convolution_kernel(replace(fused, notes={**fused.notes, "kernel": name}), machine)

        assert (apply(rule, a_machine(), [x, w], result) is not None) == taken, name


def test_what_follows_may_read_the_convolution_in_place_only() -> None:
    x, w, result = _spec()
    other = operand(1, 8, 8, 8, name="other")
    follows: dict[str, tuple[Callable[..., Any], bool]] = {
        "in place": (lambda n, i, j, c: result(n, i, j, c) * 2, True),
        "in place, twice": (lambda n, i, j, c: result(n, i, j, c) * result(n, i, j, c), True),
        "another tensor turned": (lambda n, i, j, c: result(n, i, j, c) + other(n, j, i, c), True),
        "the only image": (lambda n, i, j, c: result(0, i, j, c) + 1, True),
        "turned": (lambda n, i, j, c: result(n, j, i, c), False),
        "channels turned": (lambda n, i, j, c: result(n, i, c, j), False),
        "moved": (lambda n, i, j, c: result(n, i, tirx.min(j + 1, 7), c), False),
        "the first channel": (lambda n, i, j, c: result(n, i, j, c) - result(n, i, j, 0), False),
    }
    for name, (element, taken) in follows.items():
        last = te.compute((1, 8, 8, 8), element, name="last")
        assert (apply(convolution_kernel, a_machine(), [x, w, other], last) is not None) == taken, name


def test_what_reads_the_convolution_twice_or_another_tensor_turned_is_right() -> None:
    x, w, result = _spec()
    other = operand(1, 8, 8, 8, name="other")
    last = te.compute((1, 8, 8, 8), lambda n, i, j, c: result(n, i, j, c) * result(n, i, j, c) + other(n, j, i, c))
    image, weight, third = torch.randn(1, 4, 8, 8), torch.randn(8, 4, 3, 3), torch.randn(1, 8, 8, 8)
    kernel = built(convolution_kernel, a_machine(), [x, w, other], last)
    ours = kernel(channels_last(image), packed(weight.permute(0, 2, 3, 1), 1, 8), third, shape=(1, 8, 8, 8))
    expected = convolved(image, weight, Geometry((8, 8), before=(1, 1), after=(1, 1))) ** 2 + third.transpose(1, 2)
    assert relative_error(ours.double(), expected) < LIMIT


def test_a_sum_over_the_convolution_is_refused() -> None:
    x, w, result = _spec()
    k = te.reduce_axis((0, 8), "k")
    total = te.compute((1, 8, 8), lambda n, i, j: te.sum(result(n, i, j, k), axis=[k]), name="total")
    assert apply(convolution_kernel, a_machine(), [x, w], total) is None


@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_an_image_that_no_output_looks_at_is_not_copied(order: str) -> None:
    """Three columns of padding, of which one is looked at: the image lies beyond the end of the copied rows."""
    extents: list[int] = []

    def note(loop: Any) -> None:
        if isinstance(loop.extent, tirx.IntImm):
            extents.append(int(loop.extent))

    function = Case(Geometry((4, 1), (1, 1), (1, 10), (0, 3), (0, 3)), 4, 8, order=order).lowered()
    tvm_ffi.structural_walk(function.body, (tirx.For, note))
    assert extents
    assert min(extents) >= 0


@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_one_percent_is_seen(order: str) -> None:
    case = Case(Geometry((5, 6), before=(1, 1), after=(1, 1)), 3, 11, order=order)
    assert case.error(compiled({"kernel": case.lowered()})["kernel"], 1.01) > 1e-3
