"""Pooling, means over an image and resizing, as the operators specify them, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils import dlpack
from tvm import te, tirx

from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.reduction import reduction_kernel
from graphopt.backends.tvm.layout import CHANNELS_LAST, Ordered
from graphopt.backends.tvm.operators import pool, resize
from tests.backends.kernels.building import (
    a_machine,
    apply,
    bias_residual_relu,
    compiled,
    examples,
    operand,
    size,
)
from tests.backends.kernels.images import channels_last
from tests.backends.kernels.typed import TypedLibrary, compiled_typed
from tests.compare import relative_error

aten = torch.ops.aten
LIMIT = 2e-6
MACHINES = [a_machine(4), a_machine(16), a_machine(threads=2)]


@dataclass(frozen=True)
class Value:
    """A tensor expression in place of the Relax expression that a converter takes and gives."""

    tensor: te.Tensor

    @property
    def ty(self) -> Any:
        return SimpleNamespace(shape=list(self.tensor.shape), dtype=self.tensor.dtype)


@dataclass
class Conversion:
    """What a converter asks of a node, so that its specification can be had without a graph."""

    target: Any
    shape: list[Any]
    machine: Machine
    dtype: str = "float32"
    tables: list[tuple[te.Tensor, Tensor]] = field(default_factory=list)
    """Constants that the specification reads: operands, and what is in them."""

    @property
    def node(self) -> Any:
        return SimpleNamespace(target=self.target)

    def cast(self, value: Any, dtype: str) -> Any:
        assert str(value.ty.dtype) == dtype
        return value

    def compute(self, function: Callable[..., te.Tensor], *inputs: Any, name: str, anchor: bool) -> Value:
        assert anchor
        return Value(function(*(self._tensor(value) for value in inputs)))

    def _tensor(self, value: Any) -> te.Tensor:
        if isinstance(value, Value):
            return value.tensor
        data = dlpack.from_dlpack(value.value)
        table = operand(*data.shape, dtype=str(value.ty.dtype), name=f"table_{len(self.tables)}")
        self.tables.append((table, data))
        return table


@dataclass(frozen=True)
class Case:
    """An operator over [N, C, H, W], stored channels-last.

    Attributes:
        overload: the operator, by which the converter knows it.
        convert: its converter.
        arguments: what both take after the tensor.
        followed: whether relu(result + bias + residual) follows.
    """

    overload: Any
    convert: Callable[..., Any]
    arguments: tuple[Any, ...]
    shape: tuple[int, int, int, int]
    machine: Machine = field(default_factory=a_machine)
    followed: bool = False

    def reference(self, x: Tensor) -> Tensor:
        result: Tensor = self.overload(x.double(), *self.arguments)
        return channels_last(result)

    def specified(self, images: Any = None) -> tuple[Conversion, te.Tensor, te.Tensor]:
        n, c, h, w = self.shape
        images = n if images is None else images
        result = list(self.overload(torch.empty(self.shape, device="meta"), *self.arguments).shape)
        call = Conversion(self.overload, [images, *result[1:]], self.machine)
        x = operand(images, h, w, c)
        converted = self.convert(call, Ordered(Value(x), CHANNELS_LAST), *self.arguments)
        assert converted.order == CHANNELS_LAST
        return call, x, converted.value.tensor

    def lowered(self, images: Any = None) -> Any:
        call, x, result = self.specified(images)
        operands = [x, *(table for table, _ in call.tables)]
        if self.followed:
            bias, residual = operand(result.shape[-1], name="bias"), operand(*result.shape, name="residual")
            operands, result = [*operands, bias, residual], bias_residual_relu(result, bias, residual)
        return apply(reduction_kernel, self.machine, operands, result)

    def error(self, kernel: TypedLibrary, x: Tensor | None = None, factor: float = 1.0) -> float:
        """The error of a kernel, whose image is multiplied by a factor."""
        x = torch.randn(self.shape) if x is None else x
        expected = self.reference(x)
        values = [channels_last(x) * factor, *(data for _, data in self.specified()[0].tables)]
        if self.followed:
            bias, residual = torch.randn(expected.shape[-1]), torch.randn(expected.shape)
            values, expected = [*values, bias, residual], (expected + bias + residual).relu()
        return relative_error(kernel(values, expected.shape, torch.float32).double(), expected)


def check(cases: dict[str, Case]) -> None:
    """All cases in one library."""
    kernels = compiled_typed({name: case.lowered() for name, case in cases.items()})
    errors = {name: case.error(kernels[name]) for name, case in cases.items()}
    assert all(error < LIMIT for error in errors.values()), {n: e for n, e in errors.items() if not e < LIMIT}


def largest(shape: tuple[int, int, int, int], *arguments: Any, **how: Any) -> Case:
    return Case(aten.max_pool2d.default, pool.max_pool, arguments, shape, **how)


def average(shape: tuple[int, int, int, int], *arguments: Any, **how: Any) -> Case:
    return Case(aten.avg_pool2d.default, pool.avg_pool, arguments, shape, **how)


def adaptive(shape: tuple[int, int, int, int], outputs: Sequence[int], **how: Any) -> Case:
    return Case(aten.adaptive_avg_pool2d.default, pool.adaptive_avg_pool, (list(outputs),), shape, **how)


def test_max_pooling() -> None:
    """Kernel, stride, padding, dilation, whether the last window may reach beyond."""
    check(
        {
            "two": largest((2, 11, 6, 8), [2, 2]),
            "three_by_two": largest((2, 11, 7, 6), [3, 2], [2, 1]),
            "stem": largest((1, 11, 9, 12), [3, 3], [2, 2], [1, 1]),
            "padded_unevenly": largest((1, 11, 9, 5), [5, 3], [1, 2], [2, 0]),
            "dilated": largest((1, 11, 9, 9), [3, 3], [1, 1], [1, 1], [2, 2]),
            "ceil": largest((2, 11, 6, 7), [3, 3], [2, 2], [0, 0], [1, 1], True),
            "floor_beside_ceil": largest((2, 11, 6, 7), [3, 3], [2, 2], [0, 0], [1, 1], False),
            "ceil_padded": largest((1, 11, 7, 8), [3, 3], [3, 2], [1, 1], [1, 1], True),
            "whole": largest((1, 11, 5, 4), [5, 4]),
            "followed": largest((2, 11, 6, 8), [3, 3], [2, 2], [1, 1], followed=True),
        }
    )


def test_average_pooling() -> None:
    """Kernel, stride, padding, ceil mode, whether padding counts, divisor."""
    check(
        {
            "two": average((2, 11, 6, 8), [2, 2]),
            "three_by_two": average((2, 11, 7, 6), [3, 2], [2, 1]),
            "padding_counts": average((1, 11, 7, 8), [3, 3], [2, 2], [1, 1], False, True),
            "padding_does_not_count": average((1, 11, 7, 8), [3, 3], [2, 2], [1, 1], False, False),
            "ceil": average((1, 11, 6, 7), [3, 3], [2, 2], [0, 0], True),
            "ceil_padding_counts": average((1, 11, 6, 8), [3, 3], [2, 2], [1, 1], True, True),
            "ceil_padding_does_not_count": average((1, 11, 6, 8), [3, 3], [2, 2], [1, 1], True, False),
            "divisor": average((1, 11, 6, 8), [2, 2], [2, 2], [0, 0], False, True, 7),
            "followed": average((2, 11, 6, 8), [3, 3], [1, 1], [1, 1], followed=True),
        }
    )


def test_adaptive_pooling_and_means() -> None:
    check(
        {
            "divides": adaptive((2, 11, 6, 8), [3, 2]),
            "does_not_divide": adaptive((2, 11, 7, 10), [3, 4]),
            "grows": adaptive((1, 11, 2, 3), [5, 4]),
            "mean": adaptive((2, 11, 5, 7), [1, 1]),
            "mean_of_one_image": adaptive((1, 58, 5, 7), [1, 1]),
            "mean_of_one_pixel": adaptive((2, 11, 1, 1), [1, 1]),
            "mean_followed": adaptive((2, 11, 5, 7), [1, 1], followed=True),
            "mean_of_one_image_followed": adaptive((1, 58, 5, 7), [1, 1], followed=True),
        }
    )


def upsampled(kind: str, shape: tuple[int, int, int, int], *arguments: Any, **how: Any) -> Case:
    convert = resize.nearest if "nearest" in kind else resize.smooth
    return Case(getattr(aten, kind).vec, convert, arguments, shape, **how)


def test_resizing_of_one_axis() -> None:
    check(
        {
            "nearest_up": upsampled("upsample_nearest2d", (2, 11, 3, 4), [6, 4], None),
            "nearest_down": upsampled("upsample_nearest2d", (1, 11, 3, 7), [3, 4], None),
            "nearest_exact": upsampled("_upsample_nearest_exact2d", (1, 11, 3, 7), [3, 4], None),
            "linear_up": upsampled("upsample_bilinear2d", (2, 11, 3, 4), [7, 4], False, None),
            "linear_down": upsampled("upsample_bilinear2d", (1, 11, 3, 9), [3, 4], False, None),
            "linear_corners": upsampled("upsample_bilinear2d", (1, 11, 3, 4), [3, 9], True, None),
            "cubic": upsampled("upsample_bicubic2d", (1, 11, 5, 3), [8, 3], False, None),
            "linear_smooth": upsampled("_upsample_bilinear2d_aa", (1, 11, 9, 3), [4, 3], False, None),
            "followed": upsampled("upsample_bilinear2d", (2, 11, 3, 4), [7, 4], False, None, followed=True),
        }
    )


def test_resizing_of_two_axes_in_one_function_is_refused() -> None:
    """Each axis is a function of its own; two in one have two anchors."""
    for outputs, taken in (([6, 4], True), ([3, 8], True), ([6, 8], False)):
        case = upsampled("upsample_nearest2d", (2, 11, 3, 4), outputs, None)
        assert (case.lowered() is not None) == taken, outputs


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_channels_at_and_above_whole_vectors(machine: Machine) -> None:
    lanes = machine.lanes
    counts = (lanes, lanes + 1, 3 * lanes - 1, 7 * lanes)
    check(
        {f"max_{c}": largest((1, c, 4, 5), [2, 3], [2, 2], [0, 1], machine=machine) for c in counts}
        | {f"mean_{c}": adaptive((1, c, 3, 3), [1, 1], machine=machine) for c in counts[1:]}
    )


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_channels_below_a_vector_are_refused(machine: Machine) -> None:
    for channels in (1, 2, 3, machine.lanes - 1):
        assert largest((1, channels, 4, 4), [2, 2], machine=machine).lowered() is None, channels
        assert adaptive((1, channels, 4, 4), [1, 1], machine=machine).lowered() is None, channels
    assert largest((1, machine.lanes, 4, 4), [2, 2], machine=machine).lowered() is not None


def test_work_large_enough_to_be_divided_is_right_too() -> None:
    check(
        {
            "pooling": largest((2, 24, 20, 20), [3, 3], [1, 1], [1, 1], machine=a_machine(threads=2)),
            "mean": adaptive((1, 136, 20, 20), [1, 1], machine=a_machine(threads=2)),
            "means": adaptive((3, 40, 20, 20), [1, 1], machine=a_machine(threads=2)),
        }
    )


def test_a_free_number_of_images() -> None:
    cases = {
        "max": largest((1, 11, 5, 6), [3, 3], [2, 2], [1, 1], followed=True),
        "average": average((1, 11, 5, 6), [3, 3], [2, 2], [1, 1], True, False),
        "mean": adaptive((1, 11, 5, 6), [1, 1]),
    }
    kernels = compiled_typed({name: case.lowered(size()) for name, case in cases.items()})
    for name, case in cases.items():
        for images in (1, 2, 5):
            several = replace(case, shape=(images, *case.shape[1:]))
            assert several.error(kernels[name]) < LIMIT, (name, images)


def test_nan_and_infinities_in_pooling() -> None:
    case = largest((1, 11, 6, 6), [3, 3], [2, 2], [1, 1])
    kernel = compiled_typed({"kernel": case.lowered()})["kernel"]
    x = torch.randn(case.shape)
    x[0, :4, 2, 3], x[0, 2:7, 5, 0], x[0, 8] = math.nan, math.inf, -math.inf
    assert case.error(kernel, x) < LIMIT
    ours = kernel([channels_last(x)], (1, 3, 3, 11), torch.float32)
    assert bool(ours[..., :4].isnan().any())
    assert bool((ours[..., 8] == -math.inf).all())


@examples(6)
@given(
    operator=st.sampled_from((largest, average)),
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 30), st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padded=st.tuples(st.booleans(), st.booleans()),
    ceil=st.booleans(),
    counted=st.booleans(),
    lanes=st.sampled_from((4, 8, 16)),
)
def test_any_pooling(
    operator: Callable[..., Case],
    sizes: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padded: tuple[bool, bool],
    ceil: bool,
    counted: bool,
    lanes: int,
) -> None:
    padding = [k // 2 if pad else 0 for k, pad in zip(kernel, padded, strict=True)]
    rest = ([1, 1], ceil) if operator is largest else (ceil, counted)
    shape = (sizes[0], lanes + sizes[1], *sizes[2:])
    check({"kernel": operator(shape, list(kernel), list(stride), padding, *rest, machine=a_machine(lanes))})


def _mean(dtype: str = "float32", mark: str = "reduction", channels: Any = 8) -> tuple[te.Tensor, te.Tensor]:
    x = operand(2, 4, channels, dtype=dtype)
    k = te.reduce_axis((0, 4), "k")
    return x, te.compute((2, channels), lambda n, c: te.sum(x(n, k, c), axis=[k]), name="sum", attrs={ANCHOR: mark})


def test_only_float32_is_taken() -> None:
    for dtype, taken in (("float32", True), ("float64", False), ("float16", False), ("int32", False)):
        x, result = _mean(dtype)
        assert (apply(reduction_kernel, a_machine(), [x], result) is not None) == taken, dtype


def test_only_reductions_are_taken() -> None:
    for name, taken in (("reduction", True), ("product", False), ("convolution", False), ("concatenation", False)):
        x, result = _mean(mark=name)

        def rule(fused: Fused, machine: Machine, name: str = name) -> Any:
            assert fused.notes["kernel"] == name
            return reduction_kernel(fused, machine)

        assert (apply(rule, a_machine(), [x], result) is not None) == taken, name


def test_a_free_last_size_is_refused_and_a_free_first_size_is_not() -> None:
    x, result = _mean(channels=size())
    assert apply(reduction_kernel, a_machine(), [x], result) is None
    x, result = _mean()
    assert apply(reduction_kernel, a_machine(), [x], result) is not None


def test_what_is_no_reduction_is_refused() -> None:
    x = operand(2, 8)
    copy = te.compute((2, 8), lambda i, j: x(i, j) * 2, name="copy", attrs={ANCHOR: "reduction"})
    assert apply(reduction_kernel, a_machine(), [x], copy) is None


def test_what_follows_may_read_the_result_in_place_only() -> None:
    x, result = _mean()
    other = operand(8, 2, name="other")
    follows: dict[str, tuple[Callable[..., Any], bool]] = {
        "in place": (lambda n, c: result(n, c) / 4, True),
        "in place, twice": (lambda n, c: result(n, c) * result(n, c), True),
        "another tensor turned": (lambda n, c: result(n, c) + other(c, n), True),
        "moved": (lambda n, c: result(n, tirx.min(c + 1, 7)), False),
        "in place and the first row": (lambda n, c: result(n, c) - result(0, c), False),
    }
    for name, (element, taken) in follows.items():
        last = te.compute((2, 8), element, name="last")
        assert (apply(reduction_kernel, a_machine(), [x, other], last) is not None) == taken, name


def test_sums_that_keep_the_last_axis_are_right() -> None:
    x, result = _mean(channels=19)
    squared = te.compute((2, 19), lambda n, c: result(n, c) * result(n, c) - 1, name="squared")
    kernel = compiled({"kernel": apply(reduction_kernel, a_machine(), [x], squared)})["kernel"]
    values = torch.randn(2, 4, 19)
    assert relative_error(kernel(values, shape=(2, 19)).double(), values.double().sum(1) ** 2 - 1) < LIMIT


@pytest.mark.parametrize(
    "case",
    [
        largest((1, 11, 6, 8), [3, 3], [2, 2], [1, 1]),
        average((1, 11, 6, 8), [3, 3], [2, 2], [1, 1]),
        adaptive((1, 11, 5, 7), [1, 1]),
        upsampled("upsample_bilinear2d", (1, 11, 3, 4), [7, 4], False, None),
    ],
    ids=["max", "average", "mean", "resize"],
)
def test_one_percent_is_seen(case: Case) -> None:
    assert case.error(compiled_typed({"kernel": case.lowered()})["kernel"], factor=1.01) > 1e-3


def test_the_reference_counts_padding_and_ceiling() -> None:
    """What the tests above tell apart does differ."""
    x = torch.randn(1, 11, 6, 8).double()
    counted, not_counted = (F.avg_pool2d(x, 3, 2, 1, True, flag) for flag in (True, False))
    assert relative_error(counted, not_counted) > 0.05
    assert F.max_pool2d(x, 3, 2, ceil_mode=True).shape != F.max_pool2d(x, 3, 2, ceil_mode=False).shape
