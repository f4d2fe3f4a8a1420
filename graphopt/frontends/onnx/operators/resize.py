"""Resize and Upsample: torch's whole `interpolate` where it samples at the same places, else per-axis weights.

Axis by axis, an output element at position i samples the input at a coordinate that
`coordinate_transformation_mode` gives; nearest takes one element, linear and cubic a weighted sum of the neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.unsigned import same_bits
from graphopt.frontends.onnx.values import Floats, Ints, refuse

Array = np.ndarray[Any, np.dtype[np.float64]]

_ROUNDING: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
_HALF_PIXEL = ("half_pixel", "pytorch_half_pixel")
_INTERPOLATE = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}


@dataclass(frozen=True)
class Axis:
    """One resized axis: sizes before and after, the exact scale, and the region of interest for cropping."""

    index: int
    before: int
    after: int
    scale: float
    start: float
    end: float

    @property
    def static(self) -> bool:
        return isinstance(self.before, int) and isinstance(self.after, int)

    @property
    def whole(self) -> bool:
        """Whether it is enlarged by a whole number."""
        return self.scale == int(self.scale) and self.scale >= 1


@dataclass(frozen=True)
class Sampling:
    """How to sample: the attributes of Resize."""

    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool
    extrapolation: float


@operator("Upsample", until=8)
def upsample_attribute(x: Tensor, *, scales: Floats, mode: str = "nearest") -> Tensor:
    return resize_plain(x, scales, mode=mode)


@operator("Upsample", since=9, until=9)
def upsample(x: Tensor, scales: Floats, *, mode: str = "nearest") -> Tensor:
    return resize_plain(x, scales, mode=mode)


@operator("Resize", since=10, until=10)
def resize_plain(x: Tensor, scales: Floats, *, mode: str = "nearest") -> Tensor:
    """Before opset 11 coordinates are asymmetric and nearest rounds down; how it shrinks, runtimes disagree on."""
    if mode == "nearest" and min(scales) < 1:
        raise refuse("shrinking to the nearest element is not defined before opset 11")
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@operator("Resize", since=11)
def resize(
    x: Tensor,
    roi: Floats | None = None,
    scales: Floats | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: Ints | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    if mode not in ("nearest", "linear", "cubic") or nearest_mode not in _ROUNDING:
        raise refuse(f"mode '{mode}' with nearest_mode '{nearest_mode}' is not handled")
    how = Sampling(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a,
        bool(exclude_outside), bool(antialias), extrapolation_value,
    )  # fmt: skip
    chosen = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    regions = roi if roi and how.coordinates == "tf_crop_and_resize" else (0.0,) * len(chosen) + (1.0,) * len(chosen)
    resized = _axes(x, chosen, regions, scales or None, sizes or None, keep_aspect_ratio_policy)
    resized = [a for a in resized if not (a.scale == 1.0 and a.before is a.after and how.coordinates[:2] != "tf")]
    if how.coordinates == "align_corners" and any(a.static and a.after != a.before * a.scale for a in resized):
        raise refuse(
            "scales that give no whole sizes, with aligned corners: the specification and its reference differ"
        )
    whole = _whole(x, resized, how)
    if whole is not None:
        return whole
    for axis in resized:
        x = _resample(x, axis, how)
    return x


def _axes(
    x: Tensor, chosen: list[int], roi: Floats, scales: Floats | None, sizes: Ints | None, policy: str
) -> list[Axis]:
    if (scales is None) == (sizes is None):
        raise refuse("exactly one of 'scales' and 'sizes' must be given")
    count = len(chosen)
    before = [x.shape[i] for i in chosen]
    regions = list(zip(roi[:count], roi[count:], strict=True))
    if scales is not None:
        after = [_scaled(n, s * (b - a)) for n, s, (a, b) in zip(before, scales, regions, strict=True)]
        factors = list(scales)
    elif policy == "stretch":
        assert sizes is not None
        after = list(sizes)
        factors = [_quotient(m, n) for m, n in zip(after, before, strict=True)]
    else:
        if policy not in ("not_larger", "not_smaller") or not all(isinstance(n, int) for n in before):
            raise refuse(f"keep_aspect_ratio_policy '{policy}' on these sizes is not handled")
        assert sizes is not None
        pick = min if policy == "not_larger" else max
        factor = pick(m / n for m, n in zip(sizes, before, strict=True))
        factors, after = [factor] * count, [math.floor(factor * n + 0.5) for n in before]
    rows = zip(chosen, before, after, factors, regions, strict=True)
    return [Axis(i, n, m, s, a, b) for i, n, m, s, (a, b) in rows]


def _scaled(size: int | torch.SymInt, factor: float) -> Any:
    """`floor(size * factor)`; a dynamic size times a fraction of whole numbers."""
    if isinstance(size, int):
        return math.floor(size * factor)
    p, q = factor.as_integer_ratio()
    if factor == 1.0:
        return size
    if max(p, q) > 1024:
        raise refuse(f"a dynamic size cannot be scaled by {factor} exactly", "give the model a fixed input size")
    return size * p // q


def _quotient(after: int | torch.SymInt, before: int | torch.SymInt) -> float:
    """The scale that sizes ask for; nan when it depends on a dynamic size."""
    if isinstance(after, int) and isinstance(before, int):
        return after / before
    scales = (1, 2, 3, 4, 8, 16, 32)
    written = next((s for s in scales if str(after) == str(before * s)), None)  # asking for equality is a condition
    equal = written or next((s for s in scales if bool(after == before * s)), None)
    return math.nan if equal is None else float(equal)


def _whole(x: Tensor, axes: list[Axis], how: Sampling) -> Tensor | None:
    """The same by `interpolate`, or None when it samples elsewhere."""
    rank = x.ndim - 2
    if not axes:
        return x.clone()
    if rank not in (1, 2, 3) or min(a.index for a in axes) < 2 or how.antialias or how.exclude_outside:
        return None
    if how.mode == "nearest":
        centred = how.coordinates in (*_HALF_PIXEL, "half_pixel_symmetric") and how.nearest.startswith("round")
        if (how.coordinates == "asymmetric" and how.nearest == "floor") or (centred and all(a.whole for a in axes)):
            name = "nearest"
        elif how.coordinates == "half_pixel" and how.nearest == "round_prefer_ceil":
            name = "nearest-exact"
        else:
            return None
        return _interpolate(x, axes, name, None)
    name = _INTERPOLATE[how.mode].get(rank, "")
    corners = how.coordinates == "align_corners"
    halves = how.coordinates == "half_pixel" or (
        how.coordinates == "pytorch_half_pixel" and all(not isinstance(a.after, int) or a.after > 1 for a in axes)
    )
    if not name or not (corners or halves) or (how.mode == "cubic" and abs(how.cubic_a + 0.75) > 1e-6):
        return None
    return _interpolate(x, axes, name, corners)


def _interpolate(x: Tensor, axes: list[Axis], name: str, corners: bool | None) -> Tensor | None:
    sizes: list[Any] = list(x.shape[2:])
    scales = [1.0] * len(sizes)
    for axis in axes:
        sizes[axis.index - 2], scales[axis.index - 2] = axis.after, axis.scale
    exact = all(a.whole or math.isnan(a.scale) or (a.static and a.after == a.before * a.scale) for a in axes)
    if exact:
        return F.interpolate(x, size=sizes, mode=name, align_corners=corners)
    if any(not s > 0 for s in scales):
        return None
    return F.interpolate(x, scale_factor=scales, mode=name, align_corners=corners, recompute_scale_factor=False)


def _resample(x: Tensor, axis: Axis, how: Sampling) -> Tensor:
    if not axis.static or math.isnan(axis.scale):
        raise refuse(
            f"resizing axis {axis.index} of dynamic size with mode '{how.mode}', coordinates '{how.coordinates}'",
            "give the model a fixed input size",
        )
    places = _coordinates(axis, how.coordinates)
    if how.mode == "nearest":
        picked = np.clip(_ROUNDING[how.nearest](places), 0, axis.before - 1).astype(np.int64)
        index = torch.tensor(picked.tolist(), dtype=torch.int64)
        y = same_bits(lambda t: t.index_select(axis.index, index), x)
    else:
        weights = torch.tensor(_weights(places, axis, how).tolist(), dtype=x.dtype)  # [after, before]
        y = torch.matmul(x.movedim(axis.index, -1), weights.t()).movedim(-1, axis.index)
    outside = (places < 0) | (places > axis.before - 1)
    if how.coordinates != "tf_crop_and_resize" or not outside.any():
        return y
    shape = [-1] + [1] * (x.ndim - 1 - axis.index)
    return torch.where(torch.tensor(outside.tolist()).reshape(shape), how.extrapolation, y).to(x.dtype)


def _coordinates(axis: Axis, mode: str) -> Array:
    i = np.arange(axis.after, dtype=np.float64)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and axis.after > 1):
        return (i + 0.5) / axis.scale - 0.5
    if mode == "pytorch_half_pixel":
        return np.zeros_like(i)
    if mode == "half_pixel_symmetric":
        adjustment = axis.after / (axis.scale * axis.before)
        return axis.before / 2 * (1 - adjustment) + (i + 0.5) / axis.scale - 0.5
    if mode == "align_corners":
        return i * (axis.before - 1) / (axis.after - 1) if axis.after > 1 else np.zeros_like(i)
    if mode == "asymmetric":
        return i / axis.scale
    if mode == "tf_crop_and_resize":
        span = axis.before - 1
        if axis.after == 1:
            return np.full(1, 0.5 * (axis.start + axis.end) * span)
        return axis.start * span + i * (axis.end - axis.start) * span / (axis.after - 1)
    raise refuse(f"attribute 'coordinate_transformation_mode'='{mode}' is not handled")


def _weights(places: Array, axis: Axis, how: Sampling) -> Array:
    """Row i holds the weights of the inputs in output i; what lies outside counts for the edge, or not at all."""
    shrink = min(axis.scale, 1.0) if how.antialias else 1.0
    reach = (1 if how.mode == "linear" else 2) / shrink
    rows = np.zeros((axis.after, axis.before))
    for i, place in enumerate(places):
        taps = np.arange(math.floor(place) + math.floor(-reach) + 1, math.floor(place) + math.ceil(reach) + 1)
        weights = _kernel((taps - place) * shrink, how)
        if how.exclude_outside:
            weights = np.where((taps < 0) | (taps >= axis.before), 0.0, weights)
        if how.antialias or how.exclude_outside:
            weights = weights / weights.sum()
        np.add.at(rows[i], np.clip(taps, 0, axis.before - 1).astype(np.int64), weights)
    return rows


def _kernel(distance: Array, how: Sampling) -> Array:
    """Triangle, or Keys' cubic convolution (IEEE TASSP 29(6), 1981, equation 4) with coefficient a."""
    d = np.abs(distance)
    if how.mode == "linear":
        return np.maximum(0.0, 1.0 - d)
    a = how.cubic_a
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
