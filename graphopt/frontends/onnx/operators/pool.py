"""Pooling: as torch's whole operators where they say the same, else over explicitly padded inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.dtypes import INTEGERS
from graphopt.frontends.onnx.operators.conv import flat, padding
from graphopt.frontends.onnx.registry import Outputs, operator
from graphopt.frontends.onnx.values import Ints, refuse

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Window:
    """A pooling window: per spatial axis its width, stride, dilation, and what is padded before and after."""

    kernel: Ints
    strides: Ints
    dilations: Ints
    pads: tuple[tuple[int, int], ...]
    ceil_mode: bool

    @staticmethod
    def of(
        x: Tensor,
        kernel: Ints,
        strides: Ints | None,
        dilations: Ints | None,
        pads: Ints | None,
        auto_pad: str,
        ceil: int,
    ) -> Window:
        rank = len(kernel)
        if rank not in _MAX or x.ndim != rank + 2:
            raise refuse(f"pooling a tensor of {x.ndim} axes over {rank}")
        strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
        pairs = padding(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
        return Window(tuple(kernel), tuple(strides), tuple(dilations), tuple(pairs), bool(ceil))

    @property
    def plain(self) -> bool:
        """Whether torch's pooling takes the padding: the same on both sides and at most half of the window."""
        return all(
            isinstance(low, int) and low == high and 0 <= low <= k // 2
            for (low, high), k in zip(self.pads, self.kernel, strict=True)
        )

    def explicit(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """The padding after which floor mode gives all outputs. A last window may not start in the padding behind."""
        pairs = []
        for n, k, s, d, (low, high) in zip(sizes, self.kernel, self.strides, self.dilations, self.pads, strict=True):
            room = n + low + high - ((k - 1) * d + 1)
            last = -(-room // s) if self.ceil_mode else room // s
            if self.ceil_mode and last * s >= n + low:
                last -= 1
            pairs.append((low, last * s + (k - 1) * d + 1 - n - low))
        return pairs


@operator("MaxPool", until=9)
def max_pool_old(
    x: Tensor,
    *,
    outputs: Outputs,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
) -> tuple[Tensor, ...]:
    return max_pool(
        x, outputs=outputs, kernel_shape=kernel_shape, auto_pad=auto_pad, pads=pads,
        storage_order=storage_order, strides=strides,
    )  # fmt: skip


@operator("MaxPool", since=10)
def max_pool(
    x: Tensor,
    *,
    outputs: Outputs,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
) -> tuple[Tensor, ...]:
    """The second output numbers the elements of the whole input; `storage_order=1` counts columns first."""
    window = Window.of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if x.dtype in INTEGERS:
        if outputs > 1 or x.dtype.itemsize > 2:
            raise refuse(f"max pooling of {x.dtype}, or its indices")
        return (_max(x.to(torch.float32), window).to(x.dtype),)
    if outputs == 1:
        return (_max(x, window),)
    if not window.plain:
        raise refuse("the indices of a pooling whose padding is not symmetric")
    low = [pair[0] for pair in window.pads]
    values, index = _MAX[len(kernel_shape)](
        x, window.kernel, window.strides, low, window.dilations, window.ceil_mode, return_indices=True
    )
    return values, _numbered(index, x, storage_order)


def _max(x: Tensor, window: Window) -> Tensor:
    run = _MAX[len(window.kernel)]
    if window.plain:
        low = [pair[0] for pair in window.pads]
        return run(x, window.kernel, window.strides, low, window.dilations, window.ceil_mode)
    padded = F.pad(x, flat(window.explicit(x.shape[2:])), value=float("-inf"))
    return run(padded, window.kernel, window.strides, 0, window.dilations)


def _numbered(index: Tensor, x: Tensor, storage_order: int) -> Tensor:
    plane = functools.reduce(lambda a, b: a * b, x.shape[2:])
    if storage_order:
        if x.ndim != 4:
            raise refuse("indices in column order of a pooling that is not over two axes")
        height, width = x.shape[2:]
        index = index % width * height + index // width
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape([x.shape[0], x.shape[1]] + [1] * (x.ndim - 2))
    return index + planes * plane


@operator("AveragePool", until=9)
def average_pool_old(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    count_include_pad: int = 0,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    return average_pool(
        x, kernel_shape=kernel_shape, auto_pad=auto_pad, count_include_pad=count_include_pad, pads=pads, strides=strides
    )


@operator("AveragePool", since=10)
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """The sum over the window divided by how many of its elements count: padding only does with `count_include_pad`."""
    window = Window.of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if window.plain and all(d == 1 for d in window.dilations):
        low = [pair[0] for pair in window.pads]
        return _AVERAGE[len(kernel_shape)](
            x, window.kernel, window.strides, low, window.ceil_mode, bool(count_include_pad)
        )
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    counted = F.pad(ones, flat(window.pads), value=1.0) if count_include_pad else ones
    counted_window = Window(window.kernel, window.strides, window.dilations, (), window.ceil_mode)
    return _window_sum(x, window) / _count(counted, counted_window, window, x, bool(count_include_pad))


def _count(counted: Tensor, bare: Window, window: Window, x: Tensor, padded: bool) -> Tensor:
    total = window.explicit(x.shape[2:])
    if padded:  # the padding asked for is already in `counted`; the rest, added by ceil mode, never counts
        total = [(0, have - high) for (_, have), (_, high) in zip(total, window.pads, strict=True)]
    kernel = torch.ones([1, 1, *window.kernel], dtype=counted.dtype)
    return _CONV[len(bare.kernel)](F.pad(counted, flat(total)), kernel, None, bare.strides, 0, bare.dilations)


def _window_sum(x: Tensor, window: Window) -> Tensor:
    """Sum over each window, as a convolution with ones of every plane by itself."""
    padded = F.pad(x, flat(window.explicit(x.shape[2:])))
    planes = padded.reshape([-1, 1, *padded.shape[2:]])
    ones = torch.ones([1, 1, *window.kernel], dtype=x.dtype)
    sums = _CONV[len(window.kernel)](planes, ones, None, window.strides, 0, window.dilations)
    return sums.reshape([*x.shape[:2], *sums.shape[2:]])


@operator("LpPool", until=17)
def lp_pool_old(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    return lp_pool(x, kernel_shape=kernel_shape, auto_pad=auto_pad, p=p, pads=pads, strides=strides)


@operator("LpPool", since=18)
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    window = Window.of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _window_sum(torch.abs(x) ** p, window) ** (1.0 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    if x.ndim - 2 in _ADAPTIVE:
        return _ADAPTIVE[x.ndim - 2](x, 1)
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return torch.amax(x, tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, tuple(range(2, x.ndim)), keepdim=True)
    return norm


@operator("MaxUnpool", since=9)
def max_unpool(
    x: Tensor,
    index: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Put every value back where `index` says, counted over the whole output; the rest is zero."""
    rank = len(kernel_shape)
    strides, pads = strides or (1,) * rank, pads or (0,) * (2 * rank)
    spatial = [(n - 1) * strides[i] + kernel_shape[i] - pads[i] - pads[i + rank] for i, n in enumerate(x.shape[2:])]
    sizes = [*x.shape[:2], *spatial]
    total = functools.reduce(lambda a, b: a * b, sizes)
    flat_ = torch.zeros(total, dtype=x.dtype).scatter(0, index.reshape(-1), x.reshape(-1)).reshape(sizes)
    if output_shape is None:
        return flat_
    return F.pad(flat_, flat([(0, want - have) for want, have in zip(output_shape, sizes, strict=True)]))
