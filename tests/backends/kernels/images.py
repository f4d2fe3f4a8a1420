"""Windows over images, and what torch makes of them in float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from graphopt.backends.tvm.kernels.geometry import Window

__all__ = ["Geometry", "channels_last", "convolved"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A window over an image, as (rows, columns); padding before and after the image."""

    size: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def result(self) -> Pair:
        rows, columns = (
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, before, after, dilation in zip(
                self.size, self.kernel, self.stride, self.before, self.after, self.dilation, strict=True
            )
        )
        return rows, columns

    @property
    def window(self) -> Window:
        return Window(self.size, self.result, self.kernel, self.stride, self.before, self.dilation)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def convolved(x: Tensor, weight: Tensor, geometry: Geometry, groups: int = 1) -> Tensor:
    """x [N, C, H, W] and weight [out, C / groups, KH, KW] in float64, channels-last."""
    (top, left), (bottom, right) = geometry.before, geometry.after
    padded = F.pad(x.double(), (left, right, top, bottom))
    return channels_last(
        F.conv2d(padded, weight.double(), stride=geometry.stride, dilation=geometry.dilation, groups=groups)
    )
