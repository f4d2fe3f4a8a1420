"""A linear layer as a kernel in float64: convolutions, and everything else that sums a window of channels.

With x [batch, in, *n], W [out, in/groups, *k] and `before` zeros in front of every axis, a kernel computes

    y[o, q] = b[o] + sum over i and taps t of W[o, i, t] * x[i, q * stride + t * dilation - before]

for as many q as fit into n + before + after. It is what frameworks call a convolution: no kernel is flipped. A kernel
without axes, W [out, in], is a linear layer. Batch norms and multiplications are kernels too (`scaling`), and so are
the identity and average pooling (`from_pool`). Kernels of meta tensors tell what a merge costs before it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from graphopt.errors import GraphoptError

__all__ = ["Kernel", "Refused", "Sizes", "from_pool", "identity", "regroup", "scaling"]

Ints: TypeAlias = int | Sequence[int]
Pads: TypeAlias = int | Sequence[int] | Sequence[tuple[int, int]]
_Value = TypeVar("_Value")
Sizes: TypeAlias = Sequence[int | None]
"""Sizes of the convolved axes of an input; None for a free one."""


class Refused(GraphoptError):
    """Kernels that are no one kernel together."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """One convolution, or linear layer without axes.

    Attributes:
        weight: float64 [out, in / groups, *k].
        bias: float64 [out], or None, which is zeros.
        stride, dilation: one number per axis.
        padding: zeros before and after each axis.
        groups: how many equal parts the channels are in.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Ints = 1,
        padding: Pads = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> Kernel:
        """A kernel with numbers given as `torch.nn.functional.conv2d` takes them; weights of any dtype."""
        axes = weight.dim() - 2
        pads = [pad if isinstance(pad, tuple) else (pad, pad) for pad in _each(padding, axes)]
        wide = None if bias is None else bias.double()
        return cls(weight.double(), wide, tuple(_each(stride, axes)), tuple(pads), tuple(_each(dilation, axes)), groups)

    @property
    def axes(self) -> int:
        """How many axes it slides along."""
        return self.weight.dim() - 2

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def size(self) -> tuple[int, ...]:
        """Taps along each axis."""
        return tuple(self.weight.shape[2:])

    @property
    def reach(self) -> tuple[int, ...]:
        """From the first tap of each axis to its last, in elements of the input."""
        return tuple((k - 1) * d for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output position, all channels."""
        return self.weight.numel()

    @property
    def slack(self) -> tuple[int, ...]:
        """What is added to the size of an axis before it is divided by the stride: `(n + slack) // stride + 1`."""
        return tuple(a + b - reach - 1 for (a, b), reach in zip(self.padding, self.reach, strict=True))

    @property
    def is_pointwise(self) -> bool:
        """Whether every output position reads the input at its own place, and nothing else."""
        return all(
            (k, s, pad) == (1, 1, (0, 0)) for k, s, pad in zip(self.size, self.stride, self.padding, strict=True)
        )

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is made from the one at its own place."""
        return self.groups == self.outputs and self.weight.shape[1] == 1

    def meta(self) -> Kernel:
        """The same without data."""
        return replace(self, weight=self.weight.to("meta"), bias=None if self.bias is None else self.bias.to("meta"))


def _each(value: int | Sequence[_Value], axes: int) -> list[_Value | int]:
    """One value per axis; one alone stands for all."""
    values: list[_Value | int] = [value] if isinstance(value, int) else [*value]
    return values * axes if len(values) == 1 else values


def scaling(scale: Tensor, shift: Tensor | None = None, axes: int = 0) -> Kernel:
    """`scale * x + shift` by channel, both [channels]: an affine batch norm is scaling(s, t) with
    s = gamma / sqrt(var + eps) and t = beta - mean * s."""
    return Kernel.of(scale.reshape(-1, 1, *[1] * axes), shift, groups=scale.numel())


def identity(channels: int, groups: int = 1, kernel: Sequence[int] = ()) -> Kernel:
    """The kernel that returns its input: W [channels, channels/groups, *kernel] of zeros but for W[c, c, centre] = 1.

    (Ding et al., RepVGG, arXiv:2101.03697, section 3.3.) An even kernel has its one in front of the middle and
    a padding that differs by one.
    """
    before = [(k - 1) // 2 for k in kernel]
    weight = torch.zeros(channels, channels // groups, *kernel, dtype=torch.float64)
    rows = torch.arange(channels)
    places = (rows, rows % (channels // groups), *(torch.full_like(rows, at) for at in before))
    weight[places] = 1
    pads = [(b, k - 1 - b) for b, k in zip(before, kernel, strict=True)]
    return Kernel.of(weight, padding=pads, groups=groups)


def from_pool(
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (),
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    sizes: Sizes = (),
) -> Kernel:
    """Average pooling as a depthwise kernel of 1 / taps: W [channels, 1, *kernel].

    (Ding et al., Diverse Branch Block, arXiv:2103.13425, transform V.)

    Args:
        divisor: what the sum is divided by, where that is not the number of taps.
        sizes: those of the input, which decide what `ceil_mode` does; without them it is refused where it may add a
            window.

    Raises:
        Refused: where windows at the border are divided by another number than those inside, or hang over it.
    """
    pads = list(padding) or [0] * len(kernel)
    if not count_include_pad and divisor is None and any(pads):
        raise Refused("its average leaves the padding out, so at the border it divides by less than inside")
    taps = math.prod(kernel)
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or taps), dtype=torch.float64)
    made = Kernel.of(weight, stride=stride, padding=pads, groups=channels)
    known: Sizes = sizes or [None] * len(kernel)
    for n, s, p, slack in zip(known, stride, pads, made.slack, strict=True):
        if not ceil_mode or s == 1:
            continue
        if n is None:
            raise Refused("its ceil_mode may add a window, and the size of its input is free")
        starts = -(-(n + slack) // s)  # of the last window, in strides
        # As in the operator: a window that would start behind the input and its padding before it is none.
        if (starts if starts * s < n + p else starts - 1) != (n + slack) // s:
            raise Refused("its ceil_mode adds a window that hangs over the border")
    return made


def regroup(kernel: Kernel, groups: int) -> Kernel:
    """The same with fewer groups, of which its own are equal parts: [out, in/groups, *k], zero between the parts."""
    if groups == kernel.groups:
        return kernel
    if kernel.groups % groups:
        raise Refused(f"{kernel.groups} groups cannot become {groups}")
    out, each, *size = kernel.weight.shape
    parts = kernel.groups // groups
    blocks = kernel.weight.reshape(groups, parts, out // kernel.groups, each, *size)
    wide = kernel.weight.new_zeros(groups, parts, out // kernel.groups, parts, each, *size)
    for part in range(parts):
        wide[:, part, :, part] = blocks[:, part]
    return replace(kernel, weight=wide.reshape(out, parts * each, *size), groups=groups)
