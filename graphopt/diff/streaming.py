"""Two tensors read once, side by side, in pieces that stay in the cache; so tensors may be files larger than memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Distance", "distance", "wide"]

_PIECE = 1 << 15
"""Elements read at once: so few that torch works on them in this thread, as waiting for others would take longer."""


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
    pieces = list(zip(_pieces(a), _pieces(b), strict=True))
    start = 0
    if a.dtype == b.dtype:
        while start < len(pieces) and _same_bits(*pieces[start]):
            start += 1
        if start == len(pieces):
            return None
    total = [0.0] * 4
    largest, differing = 0.0, 0
    room, gap = torch.empty(2 * _PIECE), torch.empty(2 * _PIECE)  # two for the parts of a complex number
    for number, (x, y) in enumerate(pieces):
        if number < start:  # known to be equal: only the norm is missing
            x = wide(x)
            square = _inner(x, x, room)
            total = [total[0] + square, total[1] + square, total[2] + square, total[3]]
            continue
        x, y = wide(x), wide(y)
        gap = torch.sub(x, y, out=gap[: x.numel()] if gap.dtype == x.dtype == y.dtype else None)
        for place, (u, v) in enumerate(((x, x), (y, y), (x, y), (gap, gap))):
            total[place] += _inner(u, v, room)
        top = max(map(abs, map(float, torch.aminmax(gap))))  # a quarter of the time of a norm
        largest = top if top > largest or math.isnan(top) else largest
        differing += int(np.count_nonzero(x.numpy() != y.numpy()))
    return Distance(total[0], total[1], total[2], total[3], largest, differing)


def _inner(x: torch.Tensor, y: torch.Tensor, room: torch.Tensor) -> float:
    """The inner product. `torch.dot` wakes the threads of the BLAS for every piece, which takes a thousand times longer
    where the cores have other work.
    """
    out = room[: x.numel()] if room.dtype == x.dtype == y.dtype else None
    return float(torch.mul(x, y, out=out).sum())


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as numbers that can be summed, in one row: float32, or float64 where that loses something."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    return flat.to(torch.float32 if flat.dtype.is_floating_point else torch.float64)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.detach().reshape(-1).contiguous()
    return (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE))


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    bytes_x, bytes_y = (part.view(torch.uint8).numpy() for part in (x, y))
    if bytes_x.size % 8 == 0:
        return bool((bytes_x.view("u8") == bytes_y.view("u8")).all())
    return bool((bytes_x == bytes_y).all())
