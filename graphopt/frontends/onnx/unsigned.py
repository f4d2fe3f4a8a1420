"""Arithmetic on uint16, uint32 and uint64, for which torch has storage but few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.frontends.onnx.dtypes import SAME_BITS
from graphopt.frontends.onnx.values import refuse

__all__ = ["same_bits", "widened"]

_NARROW = (torch.uint16, torch.uint32)
_UNSIGNED = (*_NARROW, torch.uint64)


def _dtype(values: tuple[Any, ...]) -> torch.dtype | None:
    return next((x.dtype for x in values if isinstance(x, Tensor) and x.dtype in _UNSIGNED), None)


def widened(function: Callable[..., Any], *values: Any) -> Tensor:
    """`function(*values)`, computed in int64 for uint16 and uint32 and wrapped back; booleans stay booleans."""
    dtype = _dtype(values)
    if dtype is None:
        plain: Tensor = function(*values)
        return plain
    if dtype is torch.uint64:
        raise refuse("torch has no arithmetic on uint64", "cast to int64 before the node")
    result: Tensor = function(
        *(x.to(torch.int64) if isinstance(x, Tensor) and x.dtype in _NARROW else x for x in values)
    )
    return result if result.dtype is torch.bool else result.to(dtype)


def same_bits(function: Callable[..., Tensor], *values: Any) -> Tensor:
    """`function(*values)` on the signed type of the same width: for moving data, and sums and products modulo 2^n."""
    dtype = _dtype(values)
    if dtype is None:
        return function(*values)
    signed = SAME_BITS[dtype.itemsize]
    return function(*(x.view(signed) if isinstance(x, Tensor) and x.dtype is dtype else x for x in values)).view(dtype)
