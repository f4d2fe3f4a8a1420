"""Two tensors read once, side by side, in pieces that stay in the cache; so tensors may be files larger than memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = ["Distance", "distance", "wide"]

_PIECE = 1 << 18
"""Elements of float32 read at once: so few that they and their difference stay in a cache, and so many that what Python
does for a piece takes no time beside them. Of others half as many, which torch converts in this thread, as waiting for
more threads would take longer.
"""
_ROW = 1 << 13
"""Elements of one product: those of more than 10,000 are shared among threads by OpenBLAS."""
_Numbers: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two tensors of one shape are apart; `inner` is their inner product, `differing` counts elements."""

    squared_a: float
    squared_b: float
    inner: float
    squared: float
    largest: float
    differing: int

    @property
    def norm_a(self) -> float:
        return math.sqrt(self.squared_a)

    @property
    def norm_b(self) -> float:
        return math.sqrt(self.squared_b)

    @property
    def relative(self) -> float:
        """Norm of the difference over the larger norm: the same from either side. Infinite where NaN differs."""
        scale = max(self.squared_a, self.squared_b)
        if not math.isfinite(self.squared) or not math.isfinite(scale):
            return math.inf
        return math.sqrt(self.squared / scale) if scale else 0.0


def distance(a: torch.Tensor, b: torch.Tensor) -> Distance | None:
    """The distance of two tensors of one shape; None when they are equal bit for bit, which takes no arithmetic."""
    size = _PIECE if a.dtype == b.dtype == torch.float32 else _PIECE // 2
    pieces = list(zip(_pieces(a, size), _pieces(b, size), strict=True))
    start = 0
    if a.dtype == b.dtype:
        while start < len(pieces) and _same_bits(*pieces[start]):
            start += 1
        if start == len(pieces):
            return None
    total = [0.0] * 4
    largest, differing = 0.0, 0
    room = np.empty(_PIECE, np.float32)
    with np.errstate(all="ignore"):
        for number, (x, y) in enumerate(pieces):
            u = wide(x).numpy()
            if number < start:  # known to be equal: only the norm is missing
                square = _inner(u, u)
                total = [total[0] + square, total[1] + square, total[2] + square, total[3]]
                continue
            v = wide(y).numpy()
            gap = np.subtract(u, v, out=room[: u.size] if room.dtype == u.dtype == v.dtype else None)
            for place, (p, q) in enumerate(((u, u), (v, v), (u, v), (gap, gap))):
                total[place] += _inner(p, q)
            top = max(float(gap.max()), -float(gap.min()))
            largest = top if top > largest or math.isnan(top) else largest
            differing += int(np.count_nonzero(u != v))
    return Distance(total[0], total[1], total[2], total[3], largest, differing)


def _inner(x: _Numbers, y: _Numbers) -> float:
    """The inner product, by rows so short that the BLAS does not wake its threads for them: where the cores have other
    work, that takes a thousand times longer.
    """
    whole = x.size - x.size % _ROW
    rows = np.vecdot(x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW)).tolist()
    return math.fsum(rows) if whole == x.size else math.fsum(rows) + float(np.vecdot(x[whole:], y[whole:]))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as numbers that can be summed, in one row: float32, or float64 where that loses something."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    return flat.to(torch.float32 if flat.dtype.is_floating_point else torch.float64)


def _pieces(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    flat = tensor.detach().reshape(-1).contiguous()
    return (flat[start : start + size] for start in range(0, flat.numel(), size))


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    bytes_x, bytes_y = (part.view(torch.uint8).numpy() for part in (x, y))
    if bytes_x.size % 8 == 0:
        return bool((bytes_x.view("u8") == bytes_y.view("u8")).all())
    return bool((bytes_x == bytes_y).all())
