"""Making and converting tensors: constants, casts, ranges, padding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.dtypes import to_dtype
from graphopt.frontends.onnx.registry import Outputs, operator
from graphopt.frontends.onnx.unsigned import same_bits
from graphopt.frontends.onnx.values import Constant, Ints, Known, refuse, stored

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


@operator("Constant")
def constant(
    *,
    value: Constant | None = None,
    value_float: float | None = None,
    value_floats: tuple[float, ...] | None = None,
    value_int: int | None = None,
    value_ints: Ints | None = None,
) -> Tensor:
    """Exactly one attribute is given; strings and sparse tensors are refused as unknown attributes."""
    if value is not None:
        return value.tensor
    for number, dtype in ((value_float, torch.float32), (value_floats, torch.float32),
                          (value_int, torch.int64), (value_ints, torch.int64)):  # fmt: skip
        if number is not None:
            return torch.tensor(number, dtype=dtype)
    raise refuse("it has no value")


@operator("ConstantOfShape", since=9)
def constant_of_shape(sizes: Ints, *, value: Constant | None = None) -> Tensor:
    if value is None:
        return torch.zeros(sizes, dtype=torch.float32)
    if value.known is None or len(value.known.numbers) != 1:
        raise refuse("attribute 'value' must hold one number")
    return torch.full(sizes, value.known.numbers[0], dtype=value.known.dtype)


@operator("Range", since=11, until=26)
def range_(start: Known, limit: Known, delta: Known) -> Tensor:
    return range_stashed(start, limit, delta)


@operator("Range", since=27)
def range_stashed(start: Known, limit: Known, delta: Known, *, stash_type: int = 1) -> Tensor:
    """`start + i * delta` below `limit`; float16 and bfloat16 are computed in float32 (`stash_type=1`)."""
    (first,), (last,), (step,) = start.numbers, limit.numbers, delta.numbers
    if not start.dtype.is_floating_point:
        return torch.arange(first, last, step, dtype=start.dtype)
    if not all(isinstance(v, float) for v in (first, last, step)) or stash_type != 1:
        raise refuse("a range of floats whose length is dynamic, or a stash_type other than float32")
    count = max(math.ceil((last - first) / step), 0)
    wide = torch.float64 if start.dtype is torch.float64 else torch.float32
    steps: Tensor = torch.arange(count, dtype=wide) * step
    values: Tensor = first + steps
    return values.to(start.dtype)


@operator("EyeLike", since=9)
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
    return (rows + k == columns).to(x.dtype if dtype is None else to_dtype(dtype))


@operator("Trilu", since=14)
def trilu(x: Tensor, k: int | None = None, *, upper: int = 1) -> Tensor:
    return torch.triu(x, k or 0) if upper else torch.tril(x, k or 0)


@operator("Dropout", until=11)
def dropout_attribute(x: Tensor, *, outputs: Outputs, ratio: float = 0.5) -> tuple[Tensor, ...]:
    return dropout(x, ratio, outputs=outputs)


@operator("Dropout", since=12)
def dropout(
    x: Tensor,
    ratio: float | None = None,
    training_mode: int | None = None,
    *,
    outputs: Outputs,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """Inference: nothing is dropped and the mask is all true. The operator stays, for training."""
    rate = 0.5 if ratio is None else ratio
    if training_mode and rate:
        raise refuse("dropout in training mode is random", "export the model for inference")
    kept = F.dropout(x, rate, training=False)
    return (kept, torch.ones_like(x, dtype=torch.bool)) if outputs > 1 else (kept,)


@operator("Cast", until=18)
def cast_plain(x: Tensor, *, to: int) -> Tensor:
    return cast(x, to=to)


@operator("Cast", since=19, until=23)
def cast_saturate(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    return cast(x, to=to, saturate=saturate)


@operator("Cast", since=24)
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Floats go to integers towards zero; float8 saturates to its largest finite value, infinities too, on request.

    `round_mode` concerns float8e8m0 only, which is refused.
    """
    return convert(x, to_dtype(to), saturate)


@operator("CastLike", since=15, until=18)
def cast_like_plain(x: Tensor | Known, like: Tensor) -> Tensor | Known:
    return cast_like(x, like)


@operator("CastLike", since=19, until=23)
def cast_like_saturate(x: Tensor | Known, like: Tensor, *, saturate: int = 1) -> Tensor | Known:
    return cast_like(x, like, saturate=saturate)


@operator("CastLike", since=24)
def cast_like(x: Tensor | Known, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor | Known:
    """A known number stays known: the type of `like` is all that is asked."""
    if not isinstance(x, Known):
        return convert(x, like.dtype, saturate)
    numbers = [stored(v, like.dtype) for v in x.numbers] if x.concrete else [None]
    if None in numbers:
        return convert(x.tensor(), like.dtype, saturate)
    return Known.of(numbers, x.shape, like.dtype)


def convert(x: Tensor, dtype: torch.dtype, saturate: int) -> Tensor:
    """A cast as ONNX defines it; see `cast`."""
    if x.dtype is dtype:
        return x.clone()
    if dtype not in _FLOAT8:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    wide = x.to(torch.float32)
    if saturate:
        return wide.clamp(-largest, largest).to(dtype)
    if dtype is torch.float8_e4m3fn:  # torch saturates this one; what rounds beyond 448 must become NaN
        wide = torch.where(wide.abs() > 464, math.nan, wide)
    return wide.to(dtype)


@operator("BitCast", since=26)
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    dtype = to_dtype(to)
    if dtype.itemsize != x.dtype.itemsize or torch.bool in (dtype, x.dtype):
        raise refuse(f"the bits of {x.dtype} do not make {dtype}")
    return x.view(dtype)


@operator("Pad", until=10)
def pad_attributes(x: Tensor, *, pads: Ints, mode: str = "constant", value: float = 0.0) -> Tensor:
    return pad(x, pads, value, mode=mode)


@operator("Pad", since=11)
def pad(
    x: Tensor, pads: Ints, constant_value: float | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    """`pads` holds what goes before every axis, then what goes after; negative amounts cut."""
    chosen = [axis % x.ndim for axis in (axes if axes is not None else range(x.ndim))]
    before, after = pads[: len(chosen)], pads[len(chosen) :]
    if mode == "constant":
        flat: list[Any] = [0] * (2 * x.ndim)
        for axis, low, high in zip(chosen, before, after, strict=True):
            flat[2 * (x.ndim - 1 - axis) : 2 * (x.ndim - axis)] = [low, high]
        value = constant_value or 0
        return same_bits(lambda t: F.pad(t, flat, value=value), x) if x.ndim else x.clone()
    if mode not in ("reflect", "edge", "wrap"):
        raise refuse(f"attribute 'mode'='{mode}' is not handled")
    for axis, low, high in zip(chosen, before, after, strict=True):
        x = _extend(x, axis, low, high, mode)
    return x


def _extend(x: Tensor, axis: int, low: int, high: int, mode: str) -> Tensor:
    """Pad one axis from its own content, by joining slices."""
    size = x.shape[axis]
    if low < 0 or high < 0 or (mode != "edge" and (low > size or high > size)):
        raise refuse(f"padding axis {axis} of size {size} by {low} and {high} in mode '{mode}'")
    if mode == "edge":
        sizes = [list(x.shape), list(x.shape)]
        sizes[0][axis], sizes[1][axis] = low, high
        head, tail = x.narrow(axis, 0, 1).expand(sizes[0]), x.narrow(axis, size - 1, 1).expand(sizes[1])
    elif mode == "reflect":
        head, tail = x.narrow(axis, 1, low).flip(axis), x.narrow(axis, size - 1 - high, high).flip(axis)
    else:
        head, tail = x.narrow(axis, size - low, low), x.narrow(axis, 0, high)
    parts = [part for part, amount in ((head, low), (x, 1), (tail, high)) if not isinstance(amount, int) or amount]
    return torch.cat(parts, axis) if len(parts) > 1 else x
