"""What is between two values of the trunk as one convolution: all its layers, without the activations between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.analysis.trunk import between
from graphopt.ops import is_pure, lookup
from graphopt.passes._kernel import Kernel, Refused, identity
from graphopt.passes._linear import Step, image_sizes, is_layer, read_step
from graphopt.passes._merging import add, compose
from graphopt.rewriter import Node, Rewriter

__all__ = ["Region", "is_activation", "linearised", "region", "start", "windows"]

aten = torch.ops.aten

_ACTIVATIONS = frozenset(
    f"aten.{name}.default"
    for name in (
        "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
        "hardsigmoid", "sigmoid", "tanh", "softplus", "clamp", "clamp_min", "clamp_max",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """What is between two values of the trunk.

    Attributes:
        nodes: its calls in order, the last one makes the value at its end.
        steps: those that are layers which can be read as kernels on `axes` axes; `unread` says why others cannot.
    """

    source: Node
    target: Node
    nodes: tuple[Node, ...]
    steps: tuple[Step, ...]
    unread: str | None
    axes: int


def is_activation(node: Node) -> bool:
    """Whether a call is a function of single elements, the same for all."""
    return str(node.target) in _ACTIVATIONS


def region(rw: Rewriter, source: Node, target: Node) -> Region | str:
    """What is between two values of the trunk; why it cannot be one convolution."""
    axes = rw.fake(source).dim() - 2
    if axes not in (1, 2) or rw.fake(target).dim() != axes + 2:
        return f"'{source.name}' and '{target.name}' are no images with channels"
    if rw.fake(source).dtype != rw.fake(target).dtype or not rw.fake(source).dtype.is_floating_point:
        return f"'{source.name}' and '{target.name}' are not of one floating dtype"
    nodes = between(source, target)
    for node in nodes:
        if lookup(node.target) is None:
            return f"'{node.name}' ({node.target}) is an operator that is not known"
        if not is_pure(node):
            return f"'{node.name}' ({node.target}) draws random numbers or writes"
    found = [read_step(rw, node, axes) for node in nodes if is_layer(node)]
    steps = [step for step in found if isinstance(step, Step) and step.layer is not None]
    unread = next((why for why in found if isinstance(why, str)), None)
    return Region(source, target, tuple(nodes), tuple(steps), unread, axes)


def linearised(rw: Rewriter, part: Region, *, meta: bool = False) -> Kernel:
    """The kernel of a region without its activations: exact in the middle of the image if there are none.

    Args:
        meta: without data, to see what it would cost.

    Raises:
        Refused: where something else than layers, activations and sums is in it.
    """
    made: dict[Node, Kernel | None] = {part.source: None}  # None is the identity

    def given(kernel: Kernel) -> Kernel:
        return kernel.meta() if meta else kernel

    def sum_of(node: Node) -> Kernel:
        operands = [rw.argument(node, name) for name in ("self", "other")]
        if rw.argument(node, "alpha") != 1 or any(operand not in made for operand in operands):
            raise Refused(f"'{node.name}' adds something else than two values of the region")
        channels = int(rw.fake(node).shape[1])
        kernels = [made[operand] or given(identity(channels, 1, (1,) * part.axes)) for operand in operands]
        return add(kernels, image_sizes(rw, part.source))

    for node in part.nodes:
        if is_activation(node):
            made[node] = made[rw.argument(node, node.target._schema.arguments[0].name)]  # type: ignore[union-attr]
            continue
        step = read_step(rw, node, part.axes)
        if isinstance(step, Step) and step.source in made:
            before = made[step.source]
            made[node] = given(step.kernel) if before is None else compose(before, given(step.kernel))
        elif node.target is aten.add.Tensor:
            made[node] = sum_of(node)
        else:
            raise Refused(
                step if isinstance(step, str) else f"'{node.name}' ({node.target}) is no layer, activation or sum"
            )
    found = made[part.target]
    assert found is not None
    return found


def stand_in(rw: Rewriter, part: Region, size: int) -> Kernel | None:
    """For a region that is no linear one: a window of `size` that keeps its place, from the identity or from nothing.
    None where no stride makes as many positions."""
    inputs, outputs = rw.fake(part.source).shape, rw.fake(part.target).shape
    if not all(isinstance(one, int) for one in (*inputs[1:], *outputs[1:])):
        return None
    strides = [-(-n // m) for n, m in zip(inputs[2:], outputs[2:], strict=True)]
    if inputs[1] == outputs[1] and set(strides) == {1}:
        kernel = identity(inputs[1], 1, (size,) * part.axes)
    else:
        weight = torch.zeros(outputs[1], inputs[1], *[size] * part.axes, dtype=torch.float64)
        kernel = Kernel.of(weight, stride=strides, padding=size // 2)
    return kernel if _positions(kernel, inputs[2:]) == tuple(outputs[2:]) else None


def windows(rw: Rewriter, part: Region, largest: int) -> list[int]:
    """Sizes of windows that one convolution for a region may have, `largest` at most, the whole one last."""
    try:
        whole = linearised(rw, part, meta=True)
    except Refused:
        return [size for size in (1, 3) if size <= largest and stand_in(rw, part, size) is not None]
    most = max(whole.size)
    sizes = [size for size in range(1, most) if (most - size) % 2 == 0 and cropped(whole, size) is not None]
    return [size for size in (*sizes, most) if size <= largest]


def start(rw: Rewriter, part: Region, size: int, *, meta: bool = False) -> Kernel:
    """The kernel with a window of one of those sizes that a regression starts from."""
    try:
        whole = linearised(rw, part, meta=meta)
    except Refused:
        found = stand_in(rw, part, size)
    else:
        found = cropped(whole, size)
    assert found is not None
    return found.meta() if meta else found


def cropped(kernel: Kernel, size: int) -> Kernel | None:
    """The middle of a kernel; None where it is dilated, or where it would read less than it steps over."""
    if size >= max(kernel.size):
        return kernel
    if any(d != 1 for d in kernel.dilation) or any(size < s for s in kernel.stride):
        return None
    cuts = [max(0, k - size) for k in kernel.size]
    if any(cut % 2 for cut in cuts) or any(cut // 2 > min(pad) for cut, pad in zip(cuts, kernel.padding, strict=True)):
        return None
    taps = [slice(cut // 2, k - cut // 2) for cut, k in zip(cuts, kernel.size, strict=True)]
    padding = tuple((a - cut // 2, b - cut // 2) for cut, (a, b) in zip(cuts, kernel.padding, strict=True))
    return replace(kernel, weight=kernel.weight[(slice(None), slice(None), *taps)].contiguous(), padding=padding)


def _positions(kernel: Kernel, sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple((n + slack) // s + 1 for n, slack, s in zip(sizes, kernel.slack, kernel.stride, strict=True))
