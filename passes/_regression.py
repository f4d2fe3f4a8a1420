"""A convolution that makes given outputs of given inputs as nearly as it can: ridge regression on image patches.

Minimise over W [out, in, *k] and b the sum over positions of |y - W x - b|^2 + lambda |W - W0|^2, x being the window
that a kernel W0 reads. Where W0 stands for layers between which activations were left out, that is how they are made
up for. How strong the ridge is, is decided by what it gains on the half of the rows that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.passes._kernel import Kernel

__all__ = ["WIDEST", "convolve", "fitted"]

WIDEST = 3072
"""Weights of one output, beyond which a regression would take minutes; then only biases and scales are fitted."""
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""In units of the mean square of an input."""
_ROWS = 16
"""Rows for every weight of one output, at most; a random choice of positions where there are more."""
_LEAST_ROWS = 16384
_BYTES = 2**26
"""Of patches at a time."""


def convolve(kernel: Kernel, x: Tensor) -> Tensor:
    """What a kernel on one or two axes makes of x [n, in, *sizes], in the dtype of x."""
    weight, bias = kernel.weight.to(x), None if kernel.bias is None else kernel.bias.to(x)
    call = functional.conv1d if kernel.axes == 1 else functional.conv2d
    return call(_padded(kernel, x), weight, bias, kernel.stride, 0, kernel.dilation, kernel.groups)


def fitted(kernel: Kernel, xs: Sequence[Tensor], ys: Sequence[Tensor], seed: int = 0) -> Kernel:
    """The kernel moved to make ys [n, out, *sizes] of xs [n, in, *sizes], batch by batch.

    Depthwise kernels stay depthwise. Of kernels in groups, and of those with more than `WIDEST` weights for an output,
    every output gets a scale and a bias.
    """
    each = kernel.weight[0].numel()
    if kernel.groups > 1 or each > WIDEST:
        return _scaled(kernel, xs, ys)
    generator = torch.Generator().manual_seed(seed)
    halves = [_Sums(each, kernel.outputs), _Sums(each, kernel.outputs)]
    for count, (patches, rest) in enumerate(_rows(kernel, xs, ys, generator)):
        halves[count % 2].add(patches, rest)
    first, second = halves
    tried = [second.error(change) for change in first.changes(_RIDGES)]
    ridge = _RIDGES[tried.index(min(tried))]
    (change,) = first.plus(second).changes((ridge,))
    weight = kernel.weight + change[:, :-1].reshape(kernel.weight.shape).to(kernel.weight)
    bias = change[:, -1].to(kernel.weight)
    return replace(kernel, weight=weight, bias=bias if kernel.bias is None else kernel.bias + bias)


class _Sums:
    """Sums over rows of patches x [rows, each], with a one behind them, and of what a kernel leaves of the outputs."""

    def __init__(self, each: int, outputs: int) -> None:
        self.count = 0
        self.xx = torch.zeros(each + 1, each + 1, dtype=torch.float64)
        self.xr = torch.zeros(each + 1, outputs, dtype=torch.float64)
        self.rr = 0.0

    def add(self, patches: Tensor, rest: Tensor) -> None:
        x = torch.cat((patches, patches.new_ones(len(patches), 1)), 1)
        self.count += len(x)
        self.xx += (x.T @ x).double().cpu()
        self.xr += (x.T @ rest).double().cpu()
        self.rr += float(rest.double().square().sum())

    def plus(self, other: _Sums) -> _Sums:
        both = _Sums(len(self.xx) - 1, self.xr.shape[1])
        both.count, both.rr = self.count + other.count, self.rr + other.rr
        both.xx, both.xr = self.xx + other.xx, self.xr + other.xr
        return both

    def changes(self, ridges: Sequence[float]) -> Iterator[Tensor]:
        """[out, each + 1] for every ridge. The constant is not held back: it is taken out first."""
        count = max(self.count, 1)
        mean, rest = self.xx[:-1, -1] / count, self.xr[-1] / count
        inner = self.xx[:-1, :-1] / count - torch.outer(mean, mean)
        cross = self.xr[:-1] / count - torch.outer(mean, rest)
        unit = (inner.diagonal().mean() + mean.square().mean()).clamp(min=1e-30)
        values, vectors = torch.linalg.eigh(inner)
        turned = vectors.T @ cross
        for ridge in ridges:
            slopes = vectors @ (turned / (values.clamp(min=0) + ridge * unit)[:, None])
            yield torch.cat((slopes.T, (rest - mean @ slopes)[:, None]), 1)

    def error(self, change: Tensor) -> float:
        """Sum of squares of what is left after a change."""
        return self.rr - 2 * float((change.T * self.xr).sum()) + float(((change @ self.xx) * change).sum())


def _rows(
    kernel: Kernel, xs: Sequence[Tensor], ys: Sequence[Tensor], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches [rows, each] that the kernel reads, and what it leaves of the outputs there [rows, out]."""
    each = kernel.weight[0].numel()
    rows = sum(y.numel() // y.shape[1] for y in ys)
    part = min(1.0, max(_LEAST_ROWS, _ROWS * each) / max(rows, 1))
    for whole_x, whole_y in zip(xs, ys, strict=True):
        positions = whole_y[0, 0].numel()
        images = max(1, _BYTES // (4 * each * positions))
        for x, y in zip(whole_x.split(images), whole_y.split(images), strict=True):
            rest = (y.float() - convolve(kernel, x.float())).movedim(1, -1).flatten(0, -2)
            patches = _patches(kernel, x.float()).movedim(1, -1).flatten(0, -2)
            if part < 1:
                kept = torch.randperm(len(rest), generator=generator)[: max(1, int(part * len(rest)))].to(rest.device)
                patches, rest = patches[kept], rest[kept]
            middle = (len(rest) + 1) // 2
            yield patches[:middle], rest[:middle]
            yield patches[middle:], rest[middle:]


def _patches(kernel: Kernel, x: Tensor) -> Tensor:
    """[n, in * taps, positions]"""
    wide = _padded(kernel, x)
    if kernel.axes == 1:
        wide = wide[:, :, None]
        return functional.unfold(wide, (1, *kernel.size), (1, *kernel.dilation), 0, (1, *kernel.stride))
    return functional.unfold(wide, kernel.size, kernel.dilation, 0, kernel.stride)


def _padded(kernel: Kernel, x: Tensor) -> Tensor:
    return functional.pad(x, [size for pair in reversed(kernel.padding) for size in pair])


def _scaled(kernel: Kernel, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Kernel:
    """The kernel with a scale and a bias for every output, by least squares."""
    sums = torch.zeros(5, kernel.outputs, dtype=torch.float64)  # 1, a, y, a^2, a y
    for x, y in zip(xs, ys, strict=True):
        made = convolve(replace(kernel, bias=None), x.float()).movedim(1, 0).flatten(1).double().cpu()
        wanted = y.movedim(1, 0).flatten(1).double().cpu()
        products = (torch.ones_like(made), made, wanted, made.square(), made * wanted)
        sums += torch.stack([one.sum(1) for one in products])
    _, a, y, aa, ay = sums / sums[0].clamp(min=1)
    spread = aa - a.square()
    scale = torch.where(spread > 1e-12 * aa.clamp(min=1e-30), (ay - a * y) / spread.clamp(min=1e-30), 1.0)
    weight = kernel.weight * scale.to(kernel.weight).reshape(-1, *[1] * (kernel.axes + 1))
    return replace(kernel, weight=weight, bias=(y - scale * a).to(kernel.weight))
