"""Second moments of what layers read on calibration data, summed batch by batch.

Of a linear layer the rows x are what it reads, of a convolution the windows [in / groups * taps] that it slides over,
for each group apart, padding included. Then sum |W x|^2 = tr(W C W^T) with C = sum x x^T, exactly, however many samples
there were; of an embedding C is diagonal and counts how often each entry was looked up. Nothing but C is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.analysis.observe import observe
from graphopt.errors import InputError
from graphopt.model import Model
from graphopt.passes._factor_layers import Whole
from graphopt.passes._kernel import Kernel
from graphopt.rewriter import Node

__all__ = ["Moments", "moments_of", "rows_of", "windows"]

_BYTES = 2**27
"""Of rows in float64 at a time."""
_HELD = 2**31
"""Bytes of sums at a time; more layers take another run over the data. Of a mapped model it is what the largest tensor
has, as there is little memory."""


class Moments:
    """C [groups, n, n] in float64, or [entries] of an embedding, and of how many rows it is the sum."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.count = whole, 0
        groups, each = whole.groups, whole.columns
        shape = (whole.kernel.weight.shape[0],) if whole.embedding else (groups, each, each)
        self.sum = torch.zeros(shape, dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        """Take in what the layer reads on one batch.

        Raises:
            InputError: for NaN or an infinity, with the name of the layer.
        """
        if self.whole.embedding:
            self.sum += torch.bincount(value.flatten().cpu(), minlength=len(self.sum)).double()
            self.count += value.numel()
            return
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"what '{self.whole.name}' reads is not finite on the calibration data",
                why="a value is NaN or infinite" if value.numel() else None,
                todo="calibrate with data on which the model makes numbers, or leave the layer out (`leave`)",
            )
        for rows in rows_of(self.whole.kernel, value):
            self.sum.baddbmm_(rows.transpose(1, 2), rows)  # in place: the sum may be as large as all else
            self.count += rows.shape[1]

    @property
    def is_scarce(self) -> bool:
        """Whether there are fewer rows than numbers in each."""
        return not self.whole.embedding and self.count < self.sum.shape[-1]


def rows_of(kernel: Kernel, value: Tensor) -> Iterator[Tensor]:
    """What a kernel reads at every position of a value, a few positions at a time: [groups, rows, n] in float64."""
    if not kernel.axes:
        for part in value.reshape(-1, value.shape[-1]).split(max(1, _BYTES // (8 * value.shape[-1]))):
            yield part.double()[None].cpu()
        return
    each = kernel.weight[0].numel()
    for image in value.split(max(1, _BYTES // (8 * each * kernel.groups * max(1, value[0, 0].numel())))):
        found = windows(kernel, image.double().cpu())  # [n, in, *positions, *k]
        places = list(range(2, 2 + kernel.axes))
        split = found.unflatten(1, (kernel.groups, -1))
        yield split.movedim((0, *(place + 1 for place in places)), (1, *places)).flatten(1, 1 + kernel.axes).flatten(2)


def windows(kernel: Kernel, x: Tensor) -> Tensor:
    """Views of x [n, in, *sizes] under the taps of a kernel at every position: [n, in, *positions, *k]."""
    found = functional.pad(x, [size for pair in reversed(kernel.padding) for size in pair])
    for axis in range(kernel.axes):
        found = found.unfold(2 + axis, kernel.reach[axis] + 1, kernel.stride[axis])[..., :: kernel.dilation[axis]]
    return found


def moments_of(
    model: Model, batches: Sequence[Sequence[Tensor]], layers: Mapping[Node, Whole]
) -> Iterator[tuple[Node, Moments]]:
    """The moments of layers of a model, in order; layers that read the same windows of one value share them.

    Raises:
        InputError: where a layer reads what is not finite.
    """
    shared: dict[tuple[object, ...], list[Node]] = {}
    for node, whole in layers.items():
        shared.setdefault(_key(whole), []).append(node)
    waiting = list(shared.values())
    most = _HELD
    if model.params.mapped:
        most = max((tensor.numel() * tensor.element_size() for tensor in model.params.values()), default=most)
    while waiting:
        taken = [waiting.pop(0)]
        held = _bytes(layers[taken[0][0]])
        while waiting and held + _bytes(layers[waiting[0][0]]) <= most:
            taken.append(waiting.pop(0))
            held += _bytes(layers[taken[-1][0]])
        made = [Moments(layers[nodes[0]]) for nodes in taken]
        observe(model, batches, _watchers(made))
        for nodes, moments in zip(taken, made, strict=True):
            if moments.is_scarce:
                warnings.warn(scarce(moments), stacklevel=2)
            for node in nodes:
                yield node, moments
        del made, moments  # before the next ones are made


def scarce(moments: Moments) -> str:
    """What to say where there are too few rows."""
    return (
        f"'{moments.whole.name}' reads {moments.sum.shape[-1]} numbers and the calibration data has {moments.count} "
        "rows of them: what it makes of other data is not known"
    )


def _watchers(made: Sequence[Moments]) -> dict[Node, Callable[[Tensor], None]]:
    by_source: dict[Node, list[Moments]] = {}
    for moments in made:
        by_source.setdefault(moments.whole.source, []).append(moments)

    def watcher(group: list[Moments]) -> Callable[[Tensor], None]:
        def add(value: Tensor) -> None:
            for moments in group:
                moments.add(value)

        return add

    return {source: watcher(group) for source, group in by_source.items()}


def _key(whole: Whole) -> tuple[object, ...]:
    k = whole.kernel
    if whole.embedding:
        return (whole.source, "entries", k.weight.shape[0])
    return (whole.source, k.size, k.stride, k.padding, k.dilation, k.groups)


def _bytes(whole: Whole) -> int:
    return 8 * (whole.kernel.weight.shape[0] if whole.embedding else whole.groups * whole.columns**2)
