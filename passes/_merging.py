"""The algebra of merging linear layers: kernels in, one kernel out, in float64.

Functions take and return kernels (see `_kernel`) and never look at a graph. What cannot be one kernel raises `Refused`,
whose text says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from graphopt.passes._kernel import Kernel, Refused, Sizes, from_pool, identity, regroup, scaling

__all__ = [
    "Kernel", "Refused", "Sizes", "add", "border_exact", "compose", "from_pool", "identity", "regroup", "scaling",
    "stack",
]  # fmt: skip


# One after the other


def compose(first: Kernel, second: Kernel) -> Kernel:
    """`second` after `first` as one kernel, exact wherever `second` reads no padding; `border_exact` says whether that
    is everywhere. Where it is not, all padding is now in front: zeros become what `first` makes of zeros.

    M[:, :, v * d2 * s1 + w * d1] += W2[:, :, v] @ W1[:, :, w] over all pairs of taps, b = b2 + sum over v of
    W2[:, :, v] @ b1, s = s1 * s2, padding p1 + p2 * s1, on a grid of the greatest common divisor of d2 * s1 and d1. The
    groups are as many as both have in common. (Distributivity; Fu et al., DepthShrinker, arXiv:2206.00843.)

    Raises:
        Refused: where the kernels do not fit together.
    """
    if first.axes != second.axes or first.outputs != second.inputs:
        raise Refused(
            f"{first.outputs} channels on {first.axes} axes go into {second.inputs} channels on {second.axes} axes"
        )
    steps = [d * s for d, s in zip(second.dilation, first.stride, strict=True)]
    grid = [
        _grid((k1, d1), (k2, step))
        for k1, d1, k2, step in zip(first.size, first.dilation, second.size, steps, strict=True)
    ]
    size = [
        (r1 + (k2 - 1) * step) // g + 1 for r1, k2, step, g in zip(first.reach, second.size, steps, grid, strict=True)
    ]
    groups = math.gcd(first.groups, second.groups)
    weight = first.weight.new_zeros(second.outputs, first.inputs // groups, *size)
    matrices = second.weight.reshape(*second.weight.shape[:2], -1)
    for number, taps in enumerate(product(*map(range, second.size))):
        starts = [v * step // g for v, step, g in zip(taps, steps, grid, strict=True)]
        weight[_places(first, starts, grid)] += _through(first, second, matrices[:, :, number])
    return Kernel(
        weight,
        _bias_through(first, second),
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(
            (b1 + b2 * s, a1 + a2 * s)
            for (b1, a1), (b2, a2), s in zip(first.padding, second.padding, first.stride, strict=True)
        ),
        tuple(grid),
        groups,
    )


def _grid(*taps: tuple[int, int], offsets: Sequence[int] = ()) -> int:
    """The coarsest grid that the taps of all kernels lie on, each as many of them so far apart, shifted by offsets."""
    return math.gcd(*(step for count, step in taps if count > 1), *offsets) or 1


def _places(kernel: Kernel, starts: Sequence[int], grid: Sequence[int]) -> tuple[slice, ...]:
    """Where the taps of a kernel are in a weight on a finer grid, its first one at `starts`."""
    steps = [d // g if k > 1 else 1 for k, d, g in zip(kernel.size, kernel.dilation, grid, strict=True)]
    taps = [slice(at, at + (k - 1) * step + 1, step) for at, k, step in zip(starts, kernel.size, steps, strict=True)]
    return (slice(None), slice(None), *taps)


def _through(first: Kernel, second: Kernel, tap: Tensor) -> Tensor:
    """The weight of `first` times a tap [out2, in2 / groups] of `second`: [out2, in1 / groups, *k1], groups those in
    common."""
    trailing = [1] * first.axes
    if second.is_depthwise:
        return tap.reshape(-1, 1, *trailing) * first.weight
    if first.is_depthwise:
        by_group = first.weight.reshape(second.groups, 1, -1, *first.size)
        scaled = tap.reshape(second.groups, -1, tap.shape[1], *trailing) * by_group
        return scaled.reshape(second.outputs, -1, *first.size)
    groups = math.gcd(first.groups, second.groups)
    wide = regroup(first, groups).weight.reshape(groups, first.outputs // groups, -1)
    narrow = regroup(Kernel.of(tap, groups=second.groups), groups).weight
    made = narrow.reshape(groups, second.outputs // groups, -1) @ wide
    return made.reshape(second.outputs, first.inputs // groups, *first.size)


def _bias_through(first: Kernel, second: Kernel) -> Tensor | None:
    if first.bias is None:
        return second.bias
    summed = second.weight.reshape(*second.weight.shape[:2], -1).sum(2)
    by_group = summed.reshape(second.groups, second.outputs // second.groups, -1)
    made = (by_group @ first.bias.reshape(second.groups, -1, 1)).flatten()
    return made if second.bias is None else made + second.bias


def border_exact(first: Kernel, second: Kernel) -> str | None:
    """Why `compose` is wrong at the border, or None where it is exact everywhere.

    `second` pads the output of `first` with zeros, the merged kernel reads what `first` makes of the zeros around its
    own input. Those are the same where `second` pads nothing, or where `first` adds no bias and no position outside
    its output reaches its input: before the first one when (k1 - 1) * d1 < s1 + before1, behind the last one when
    (k1 - 1) * d1 <= after1. So a 1x1 kernel without padding and bias may be followed by any padding, one with a bias by
    none. Holds for inputs of every size.
    """
    padded = [axis for axis, pads in enumerate(second.padding) if any(pads)]
    if not padded:
        return None
    if first.bias is not None and bool((first.bias != 0).any()):
        return "the second pads with zeros what the first adds a bias to, so the border would see that bias"
    for axis in padded:
        (before, after), (padded_before, padded_after) = first.padding[axis], second.padding[axis]
        reach = first.reach[axis]
        if (padded_before and reach >= first.stride[axis] + before) or (padded_after and reach > after):
            return "the second pads with zeros where the first would still reach its input"
    return None


# Side by side


def add(kernels: Sequence[Kernel], sizes: Sizes = ()) -> Kernel:
    """The sum of kernels that read one input: each at its place in the smallest window that holds all, on the coarsest
    grid that all taps lie on, so that 1x1 is the middle of 3x3 and a dilated 3x3 with a 1x1 stays a dilated 3x3. The
    groups are as many as all have in common.

    Args:
        sizes: those of the input, where they are known: kernels may count as many outputs there and not elsewhere.

    Raises:
        Refused: where strides, channels or the number of outputs differ.
    """
    groups = math.gcd(*(kernel.groups for kernel in kernels))
    if len({(kernel.outputs, kernel.inputs) for kernel in kernels}) > 1:
        raise Refused("their channels differ")
    placed = _placed([regroup(kernel, groups) for kernel in kernels], sizes)
    biases = [kernel.bias for kernel in kernels if kernel.bias is not None]
    weight = placed[0].weight.clone()
    for kernel in placed[1:]:
        weight += kernel.weight
    return replace(placed[0], weight=weight, bias=torch.stack(biases).sum(0) if biases else None)


def stack(kernels: Sequence[Kernel], sizes: Sizes = ()) -> Kernel:
    """Kernels that read one input as one with the outputs of all, in order; several get one group.

    A missing bias is zeros where another kernel has one.

    Raises:
        Refused: where strides, inputs or the number of outputs along an axis differ.
    """
    if len({kernel.inputs for kernel in kernels}) > 1:
        raise Refused("their input channels differ")
    placed = _placed(kernels if len(kernels) == 1 else [regroup(kernel, 1) for kernel in kernels], sizes)
    biases = [k.weight.new_zeros(k.outputs) if k.bias is None else k.bias for k in placed]
    bias = torch.cat(biases) if any(kernel.bias is not None for kernel in kernels) else None
    return replace(placed[0], weight=torch.cat([kernel.weight for kernel in placed]), bias=bias)


def _placed(kernels: Sequence[Kernel], sizes: Sizes) -> list[Kernel]:
    """The kernels with one window, grid and padding for all."""
    stride = kernels[0].stride
    if any(kernel.axes != kernels[0].axes for kernel in kernels):
        raise Refused("they slide along different numbers of axes")
    if any(kernel.stride != stride for kernel in kernels):
        raise Refused(f"their strides differ: {', '.join(str(list(kernel.stride)) for kernel in kernels)}")
    low, grid, size, pads = [], [], [], []
    for axis in range(kernels[0].axes):
        _same_count(kernels, axis, sizes[axis] if sizes else None)
        befores = [kernel.padding[axis][0] for kernel in kernels]
        low.append(max(befores))
        high = max(kernel.reach[axis] - kernel.padding[axis][0] for kernel in kernels)
        taps = [(kernel.size[axis], kernel.dilation[axis]) for kernel in kernels]
        grid.append(_grid(*taps, offsets=[before - befores[0] for before in befores]))
        size.append((high + low[-1]) // grid[-1] + 1)
        # As many outputs as the kernel with most room has; behind the last tap of all that is never less than zero.
        pads.append((low[-1], max(kernel.slack[axis] for kernel in kernels) + 1 + high))
    placed = []
    for kernel in kernels:
        weight = kernel.weight.new_zeros(*kernel.weight.shape[:2], *size)
        starts = [(a - b) // g for a, (b, _), g in zip(low, kernel.padding, grid, strict=True)]
        weight[_places(kernel, starts, grid)] = kernel.weight
        placed.append(replace(kernel, weight=weight, padding=tuple(pads), dilation=tuple(grid)))
    return placed


def _same_count(kernels: Sequence[Kernel], axis: int, n: int | None) -> None:
    """Refuse kernels with different numbers of outputs along an axis."""
    stride = kernels[0].stride[axis]
    counts = {kernel.slack[axis] if n is None else (n + kernel.slack[axis]) // stride for kernel in kernels}
    if len(counts) > 1:
        free = " for every size of the input" if n is None else ""
        raise Refused(f"their outputs are not of one size{free}")
