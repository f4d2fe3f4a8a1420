"""Merged kernels compute what the kernels one by one do, borders included, or are refused with the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from graphopt.passes import _merging as merging
from graphopt.passes._merging import Kernel, Refused
from tests.compare import relative_error

EXACT = 1e-10
CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)

Draw = Callable[[st.SearchStrategy[Any]], Any]
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def run(kernel: Kernel, x: Tensor) -> Tensor:
    """The kernel as the framework computes it."""
    if not kernel.axes:
        return F.linear(x, merging.regroup(kernel, 1).weight, kernel.bias)
    pads = [size for pair in reversed(kernel.padding) for size in pair]
    options = {"stride": kernel.stride, "dilation": kernel.dilation, "groups": kernel.groups}
    return CONVOLVE[kernel.axes](F.pad(x, pads), kernel.weight, kernel.bias, **options)


def image(kernel: Kernel, sizes: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, kernel.inputs, *sizes, generator=generator, dtype=torch.float64)


def fits(kernel: Kernel, sizes: tuple[int, ...]) -> bool:
    return all(n + slack >= 0 for n, slack in zip(sizes, kernel.slack, strict=True))


def random(out: int, inputs: int, size: tuple[int, ...], *, bias: bool = True, seed: int = 0, **more: Any) -> Kernel:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs // more.get("groups", 1), *size, generator=generator, dtype=torch.float64)
    shift = torch.randn(out, generator=generator, dtype=torch.float64) if bias else None
    return Kernel.of(weight, shift, **more)


@st.composite
def kernels(
    draw: Draw, inputs: int | None = None, outputs: int | None = None, axes: int = 2, largest: int = 7, **fixed: Any
) -> Kernel:
    """Kernels of 1 to `largest` taps, strides and dilations of 1 to 3, any groups, paddings unlike before and after."""
    inputs = inputs or draw(st.sampled_from((1, 2, 4, 6)))
    outputs = outputs or draw(st.sampled_from((1, 2, 4, 6)))
    shared = math.gcd(inputs, outputs)
    numbers = lambda low, high: st.tuples(*[st.integers(low, high)] * axes)  # noqa: E731 - shorter than its uses
    pad = st.one_of(st.integers(0, 3).map(lambda p: (p, p)), st.tuples(st.integers(0, 3), st.integers(0, 3)))
    options = {
        "groups": draw(st.sampled_from([g for g in range(1, shared + 1) if shared % g == 0])),
        "stride": draw(numbers(1, 3)),
        "dilation": draw(numbers(1, 3)),
        "padding": draw(st.one_of(st.just(0), st.tuples(*[pad] * axes))),
    } | fixed
    return random(
        outputs, inputs, draw(numbers(1, largest)), bias=draw(st.booleans()), seed=draw(st.integers(0, 9)), **options
    )


# One after the other


@quick
@given(st.data(), st.integers(0, 3))
def test_composition_is_exact_or_refused_and_always_exact_inside(data: st.DataObject, axes: int) -> None:
    largest = {3: 2, 2: 7}.get(axes, 7)
    first = data.draw(kernels(axes=axes, largest=largest))
    second = data.draw(kernels(inputs=first.outputs, axes=axes, largest=largest))
    sizes = tuple(data.draw(st.integers(5, 40 if axes < 3 else 12)) for _ in range(axes))
    middle = tuple((n + slack) // s + 1 for n, slack, s in zip(sizes, first.slack, first.stride, strict=True))
    assume(fits(first, sizes) and fits(second, middle))
    x, merged = image(first, sizes), merging.compose(first, second)
    expected, actual = run(second, run(first, x)), run(merged, x)
    assert actual.shape == expected.shape and merged.groups == math.gcd(first.groups, second.groups)
    why = merging.border_exact(first, second)
    if why is None:
        assert relative_error(actual, expected) <= EXACT
        return
    assert "the second pads with zeros" in why
    inside = tuple(slice(*_inside(second, axis, n)) for axis, n in enumerate(middle))
    scale = float(expected.abs().max())
    assert float((actual - expected)[(..., *inside)].abs().sum()) <= EXACT * scale * max(actual.numel(), 1)
    if all(s == 1 for s in (*first.stride, *second.stride)) and not _is_small(first, second):
        assert relative_error(actual, expected) > 1e-8, "refused, and yet exact"


def _inside(second: Kernel, axis: int, n: int) -> tuple[int, int]:
    """The outputs of `second` that read none of its padding."""
    before, stride = second.padding[axis][0], second.stride[axis]
    last = n - 1 - second.reach[axis] + before
    return -(-before // stride), max(last // stride + 1, 0)


def _is_small(first: Kernel, second: Kernel) -> bool:
    """Whether a padding lies so far out that not every tap of the kernel before it reaches the input from there."""
    reach = zip(first.reach, first.padding, second.padding, second.reach, first.dilation, second.dilation, strict=True)
    return any(max(d1, d2) > 1 or max(*p2, *p1) > max(r1, r2) for r1, p1, p2, r2, d1, d2 in reach)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (random(8, 8, (1, 1), bias=False), random(8, 8, (3, 3), padding=1)),
        (replace(random(8, 8, (1, 1)), bias=torch.zeros(8, dtype=torch.float64)), random(8, 8, (3, 3), padding=1)),
        (random(8, 8, (3, 3), padding=1), random(8, 8, (3, 3))),
        (random(8, 8, (3, 3), padding=2, bias=False), random(8, 8, (3, 3), padding=1)),  # reads nothing from there
        (random(8, 8, (1, 3)), random(8, 8, (1, 1), stride=2)),
        (random(8, 8, (1, 1), stride=2, bias=False), random(8, 8, (3, 3), padding=1)),
        (random(8, 8, (3, 1), bias=False), random(8, 8, (1, 3), padding=(0, 1))),  # along the axis of one tap only
    ],
)
def test_what_is_near_the_counter_examples_is_exact(first: Kernel, second: Kernel) -> None:
    x = image(first, (9, 12))
    assert merging.border_exact(first, second) is None
    assert relative_error(run(merging.compose(first, second), x), run(second, run(first, x))) <= EXACT


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_border_rule_refuses_all_that_is_wrong_for_some_size_and_nothing_else(size: int, stride: int) -> None:
    """One axis, every padding in front of and behind the first and the second, inputs of every remainder."""
    exact = 0
    for before, after, dilation in itertools.product(range(5), range(5), (1, 2)):
        pads = [(before, after)]
        first = random(2, 2, (size,), bias=False, stride=stride, dilation=dilation, padding=pads)
        for padding in ((1, 0), (0, 1), (2, 2)):
            second = random(2, 2, (3,), seed=1, padding=[padding])
            merged, worst = merging.compose(first, second), 0.0
            for x in (image(first, (n,)) for n in (12, 13, 14)):
                worst = max(worst, relative_error(run(merged, x), run(second, run(first, x))))
            allowed = merging.border_exact(first, second) is None
            assert allowed == (worst <= EXACT), (pads, dilation, padding, worst)
            exact += allowed
    assert exact > 10


def test_depthwise_stays_depthwise_and_costs_what_a_larger_one_does() -> None:
    first, second = random(6, 6, (3, 3), groups=6), random(6, 6, (3, 3), groups=6, seed=1)
    merged = merging.compose(first, second)
    assert merged.is_depthwise and merged.size == (5, 5) and merged.macs == 6 * 25
    pointwise = random(4, 6, (1, 1))
    dense = merging.compose(first, pointwise)
    assert (dense.groups, dense.size, dense.macs) == (1, (3, 3), 4 * 6 * 9)
    assert merging.compose(random(8, 4, (1, 1), groups=4), random(8, 8, (1, 1), groups=8)).groups == 4


def test_dilations_keep_their_grid() -> None:
    merged = merging.compose(random(2, 2, (3,), dilation=2), random(2, 2, (3,), dilation=4))
    assert (merged.size, merged.dilation) == ((7,), (2,))
    strided = merging.compose(random(2, 2, (1,), stride=3), random(2, 2, (3,)))
    assert (strided.size, strided.dilation, strided.stride) == ((3,), (3,), (3,))


def test_meta_kernels_have_the_shapes_of_the_merged() -> None:
    first, second = random(6, 4, (3, 3), groups=2), random(9, 6, (5, 1), groups=3)
    merged, told = merging.compose(first, second), merging.compose(first.meta(), second.meta())
    assert told.weight.shape == merged.weight.shape and told.weight.is_meta and told.macs == merged.macs


def test_linear_layers_are_kernels_without_axes() -> None:
    first, second = random(5, 3, ()), random(4, 5, (), seed=1)
    x = torch.randn(7, 3, dtype=torch.float64)
    merged = merging.compose(first, second)
    assert merged.is_pointwise and merged.weight.shape == (4, 3)
    assert relative_error(run(merged, x), run(second, run(first, x))) <= EXACT
    assert (
        relative_error(
            run(merging.add([first, random(5, 3, (), seed=2)]), x), run(first, x) + run(random(5, 3, (), seed=2), x)
        )
        <= EXACT
    )


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Refused, match="8 channels on 2 axes go into 6 channels on 2 axes"):
        merging.compose(random(8, 8, (1, 1)), random(8, 6, (1, 1)))
    with pytest.raises(Refused, match="on 1 axes"):
        merging.compose(random(8, 8, (1,)), random(8, 8, (1, 1)))
    with pytest.raises(Refused, match="4 groups cannot become 3"):
        merging.regroup(random(8, 8, (1, 1), groups=4), 3)


# Side by side


@quick
@given(st.data(), st.integers(0, 3), st.booleans())
def test_sums_and_stacks_are_exact_or_refused(data: st.DataObject, axes: int, known: bool) -> None:
    largest = {3: 3}.get(axes, 7)
    inputs, outputs = data.draw(st.sampled_from((2, 4, 6))), data.draw(st.sampled_from((2, 4, 6)))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
    fixed = {"axes": axes, "largest": largest, "stride": stride}
    first = data.draw(kernels(inputs=inputs, outputs=outputs, **fixed))
    others = [
        _of_one_size(first, data.draw(kernels(inputs=inputs, outputs=outputs, **fixed)), data.draw(st.integers(0, 4)))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    members = [first, *(other for other in others if other is not None)]
    sizes = tuple(data.draw(st.integers(8, 30 if axes < 3 else 10)) for _ in range(axes))
    assume(fits(first, sizes))
    x = image(first, sizes)
    outs = [run(member, x) for member in members]
    summed, stacked = (merge(members, sizes if known else ()) for merge in (merging.add, merging.stack))
    assert relative_error(run(summed, x), torch.stack(outs).sum(0)) <= EXACT
    assert relative_error(run(stacked, x), torch.cat(outs, 1)) <= EXACT
    assert summed.groups == math.gcd(*(member.groups for member in members))
    assert all(min(pads) >= 0 for pads in summed.padding)


def _of_one_size(first: Kernel, other: Kernel, shift: int) -> Kernel | None:
    """`other` with a padding that gives it as many outputs as `first`; None where that takes less than none."""
    pads = []
    for slack, reach in zip(first.slack, other.reach, strict=True):
        both = slack + reach + 1
        before = min(shift, max(both, 0))
        if both < 0:
            return None
        pads.append((before, both - before))
    return replace(other, padding=tuple(pads))


def test_a_small_kernel_is_the_middle_of_a_larger_one() -> None:
    big, small, dilated = (
        random(4, 4, (3, 3), padding=1),
        random(4, 4, (1, 1)),
        random(4, 4, (3, 3), dilation=2, padding=2),
    )
    parts = [big, small, merging.identity(4)]
    with pytest.raises(Refused, match="axes"):
        merging.add(parts)
    merged = merging.add([big, small, merging.identity(4, kernel=(1, 1)), merging.identity(4, 4, (3, 3))])
    assert merged.size == (3, 3) and merged.padding == ((1, 1), (1, 1)) and merged.bias is not None
    assert merging.add([dilated, small]).size == (3, 3) and merging.add([dilated, small]).dilation == (2, 2)
    stuffed = merging.add([dilated, big])
    assert (stuffed.size, stuffed.dilation, stuffed.padding) == ((5, 5), (1, 1), ((2, 2), (2, 2)))
    asymmetric = merging.add([random(4, 4, (1, 3), padding=(0, 1)), random(4, 4, (3, 1), padding=(1, 0))])
    assert asymmetric.size == (3, 3) and bool((asymmetric.weight[:, :, ::2, ::2] == 0).all())


def test_sums_that_agree_at_some_sizes_only_are_refused_where_sizes_are_free() -> None:
    """A strided 2-tap and a strided 1-tap kernel count as many outputs for even sizes and not for odd ones."""
    pair = [random(2, 2, (2,), stride=2), random(2, 2, (1,), stride=2)]
    x = image(pair[0], (8,))
    assert relative_error(run(merging.add(pair, (8,)), x), run(pair[0], x) + run(pair[1], x)) <= EXACT
    for sizes in ((), (None,), (9,)):
        with pytest.raises(Refused, match="not of one size"):
            merging.add(pair, sizes)


def test_strides_and_channels_that_differ_are_refused() -> None:
    with pytest.raises(Refused, match="strides differ"):
        merging.add([random(2, 2, (1,), stride=2), random(2, 2, (1,))])
    with pytest.raises(Refused, match="channels differ"):
        merging.add([random(2, 2, (1,)), random(4, 2, (1,))])
    with pytest.raises(Refused, match="input channels differ"):
        merging.stack([random(2, 2, (1,)), random(2, 4, (1,))])


# What is a kernel too


@quick
@given(st.sampled_from((2, 4, 6)), st.sampled_from((1, 2)), st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_the_identity_returns_its_input(channels: int, groups: int, size: list[int]) -> None:
    kernel = merging.identity(channels, groups, size)
    x = image(kernel, (9,) * len(size))
    assert torch.equal(run(kernel, x), x)


@quick
@given(st.data())
def test_a_batch_norm_is_a_scaling(data: st.DataObject) -> None:
    first = data.draw(kernels(axes=2, largest=3))
    scale, shift = torch.randn(2, first.outputs, dtype=torch.float64)
    x = image(first, (11, 12))
    merged = merging.compose(first, merging.scaling(scale, shift, axes=2))
    assert merged.groups == first.groups and merged.weight.shape == first.weight.shape
    assert relative_error(run(merged, x), run(first, x) * scale[:, None, None] + shift[:, None, None]) <= EXACT


@quick
@given(st.data(), st.integers(1, 3), st.booleans(), st.booleans())
def test_average_pooling_is_a_kernel_or_refused(data: st.DataObject, axes: int, ceil_mode: bool, counts: bool) -> None:
    size = [data.draw(st.integers(1, 5)) for _ in range(axes)]
    stride = [data.draw(st.integers(1, 3)) for _ in range(axes)]
    padding = [data.draw(st.integers(0, k // 2)) for k in size]
    divisor = data.draw(st.sampled_from((None, None, 3))) if axes > 1 else None
    sizes = [data.draw(st.integers(6, 12)) for _ in range(axes)]
    x = torch.randn(2, 3, *sizes, dtype=torch.float64)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    extra = {"divisor_override": divisor} if divisor else {}
    expected = pool(x, size, stride, padding, ceil_mode, counts, **extra)
    options = {"ceil_mode": ceil_mode, "count_include_pad": counts, "divisor": divisor}
    try:
        kernel = merging.from_pool(3, size, stride, padding, sizes=sizes, **options)
    except Refused as why:
        plain = pool(x, size, stride, padding, False, True, **extra)
        hangs = expected.shape != plain.shape
        assert ("ceil_mode adds a window" in why.what and hangs) or (
            "leaves the padding out" in why.what and any(padding)
        )
        return
    assert kernel.is_depthwise and relative_error(run(kernel, x), expected) <= EXACT


def test_pooling_of_free_sizes_is_refused_where_a_window_may_be_added() -> None:
    with pytest.raises(Refused, match="size of its input is free"):
        merging.from_pool(3, [2], [2], ceil_mode=True)
    assert merging.from_pool(3, [3], [1], [1], ceil_mode=True).size == (3,)
