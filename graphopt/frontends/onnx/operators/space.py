"""Sampling images at coordinates, and folding patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.operators.conv import flat
from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.values import Ints, refuse

_MODES = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}


@operator("GridSample", since=16, until=19)
def grid_sample_named_by_rank(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """Before opset 20 the modes are called bilinear and bicubic."""
    names = {name: ours for ours, name in _MODES.items()}
    if mode not in names:
        raise refuse(f"attribute 'mode'='{mode}' is not handled")
    return grid_sample(x, grid, align_corners=align_corners, mode=names[mode], padding_mode=padding_mode)


@operator("GridSample", since=20)
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    if mode not in _MODES or padding_mode not in ("zeros", "border", "reflection"):
        raise refuse(f"mode '{mode}' with padding_mode '{padding_mode}' is not handled")
    return F.grid_sample(x, grid, _MODES[mode], padding_mode, bool(align_corners))


@operator("AffineGrid", since=20)
def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, list(size), bool(align_corners))


@operator("Col2Im", since=18)
def column_to_image(
    x: Tensor,
    image_shape: Ints,
    block_shape: Ints,
    *,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """The sum of overlapping patches; two spatial axes."""
    if len(image_shape) != 2:
        raise refuse(f"folding {len(image_shape)} axes; two are handled")
    low, high = (pads or (0,) * 4)[:2], (pads or (0,) * 4)[2:]
    padded = tuple(n + a + b for n, a, b in zip(image_shape, low, high, strict=True))
    image = F.fold(x, padded, block_shape, dilations or 1, 0, strides or 1)
    return F.pad(image, flat([(-a, -b) for a, b in zip(low, high, strict=True)]))
