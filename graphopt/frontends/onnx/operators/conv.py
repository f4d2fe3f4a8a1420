"""Convolutions, as torch's whole operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.values import Ints, refuse

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padding(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Ints | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """What is added before and after each spatial axis. SAME makes ceil(size / stride) outputs."""
    rank = len(kernel)
    if auto_pad == "NOTSET":
        pads = pads or (0,) * (2 * rank)
        return [(pads[i], pads[i + rank]) for i in range(rank)]
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise refuse(f"attribute 'auto_pad'='{auto_pad}' is not handled")
    result = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (width - 1) * dilation + 1
        total = reach - 1 if stride == 1 else _at_least_zero((-(-size // stride) - 1) * stride + reach - size)
        small, large = total // 2, total - total // 2
        result.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return result


def _at_least_zero(size: int) -> int:
    return int(torch.sym_max(size, 0)) if isinstance(size, int) else torch.sym_max(size, 0)


def flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Pairs per axis in the order of `F.pad`: last axis first."""
    return [amount for pair in reversed(pairs) for amount in pair]


def kernel_of(weight: Tensor, kernel_shape: Ints | None) -> tuple[int, ...]:
    kernel = tuple(weight.shape[2:])
    if kernel_shape is not None and tuple(kernel_shape) != kernel:
        raise refuse(f"attribute 'kernel_shape'={list(kernel_shape)} is not the weight's {list(kernel)}")
    if len(kernel) not in _CONV:
        raise refuse(f"a convolution over {len(kernel)} axes")
    return kernel


@operator("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """x [N, C, ...], w [M, C / group, ...]; padding that is not symmetric becomes an operator of its own."""
    kernel = kernel_of(w, kernel_shape)
    ones = (1,) * len(kernel)
    strides, dilations = strides or ones, dilations or ones
    pairs = padding(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    if all(isinstance(low, int) and low == high and low >= 0 for low, high in pairs):
        return _CONV[len(kernel)](x, w, b, strides, [low for low, _ in pairs], dilations, group)
    return _CONV[len(kernel)](F.pad(x, flat(pairs)), w, b, strides, 0, dilations, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """x [N, C, ...], w [C, M / group, ...]; cuts that are not symmetric become an operator of their own."""
    kernel = kernel_of(w, kernel_shape)
    rank = len(kernel)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    extra = list(output_padding or (0,) * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = tuple(size * stride for size, stride in zip(x.shape[2:], strides, strict=True))
    if output_shape is None:
        pairs = padding(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    else:
        full = [(n - 1) * s + r + e for n, s, r, e in zip(x.shape[2:], strides, reach, extra, strict=True)]
        pairs = _cuts(full, output_shape[-rank:], auto_pad)
    run = _TRANSPOSED[rank]
    fits = all(e == 0 or e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    if fits and all(isinstance(low, int) and low == high and low >= 0 for low, high in pairs):
        return run(x, w, b, strides, [low for low, _ in pairs], extra, group, dilations)
    if b is not None and any(e - high > 0 for e, (_, high) in zip(extra, pairs, strict=True)):
        result = run(x, w, None, strides, 0, 0, group, dilations)
        grown = F.pad(result, flat([(-low, e - high) for e, (low, high) in zip(extra, pairs, strict=True)]))
        return grown + b.reshape([-1] + [1] * rank)
    result = run(x, w, b, strides, 0, 0, group, dilations)
    return F.pad(result, flat([(-low, e - high) for e, (low, high) in zip(extra, pairs, strict=True)]))


def _cuts(full: Sequence[int], wanted: Sequence[int], auto_pad: str) -> list[tuple[int, int]]:
    """How much of the full result goes before and after; a negative amount adds zeros behind."""
    cuts = []
    for have, want in zip(full, wanted, strict=True):
        total = have - want
        if isinstance(total, int) and total < 0:
            cuts.append((0, total))
            continue
        small, large = total // 2, total - total // 2
        cuts.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return cuts


@operator("ConvInteger", since=10)
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution of the values minus their zero points, in int32; float64 holds the sums exactly."""
    wide, weight = x.to(torch.float64), w.to(torch.float64)
    wide = wide if x_zero is None else wide - x_zero.to(torch.float64)
    if w_zero is not None:
        weight = weight - w_zero.to(torch.float64).reshape([-1] + [1] * (w.ndim - 1))
    result = conv(
        wide, weight, None, auto_pad=auto_pad, dilations=dilations, group=group,
        kernel_shape=kernel_shape, pads=pads, strides=strides,
    )  # fmt: skip
    return result.to(torch.int32)


@operator("CausalConvWithState", since=27)
def causal_conv_with_state(
    x: Tensor, w: Tensor, b: Tensor | None = None, past: Tensor | None = None, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over the past and present: x [B, C, L], w [C, 1, k], past and the state [B, C, k - 1]."""
    if activation not in ("none", "silu", "swish"):
        raise refuse(f"attribute 'activation'='{activation}' is not handled")
    behind = w.shape[2] - 1
    whole = F.pad(x, (behind, 0)) if past is None else torch.cat([past, x], 2)
    y = F.conv1d(whole, w, b, groups=x.shape[1])
    state = whole.narrow(2, whole.shape[2] - behind, behind)
    return (y if activation == "none" else F.silu(y)), state
