"""How the numbers of two tensors are distributed, over one range, so that the two can be drawn on one axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.diff.streaming import wide

__all__ = ["Histogram", "histogram"]

_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of the elements in bins of equal width from `low` to `high`; elements that are not finite are left out."""

    low: float
    high: float
    a: tuple[int, ...]
    b: tuple[int, ...]


def histogram(a: torch.Tensor, b: torch.Tensor, bins: int = 32) -> Histogram | None:
    """The distributions of two tensors of any shapes; None where one has no numbers to count."""
    sides = [tensor for tensor in (a, b) if tensor.device.type != "meta" and tensor.numel()]
    if len(sides) < 2:
        return None
    ends = [_ends(tensor) for tensor in sides]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if low > high:  # nothing finite on either side
        return None
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [_counts(tensor, low, high, bins) for tensor in sides]
    return Histogram(low, high, counts[0], counts[1])


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.detach().reshape(-1)
    return [flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE)]


def _finite(piece: torch.Tensor) -> torch.Tensor:
    numbers = wide(piece)
    return numbers[torch.isfinite(numbers)]


def _ends(tensor: torch.Tensor) -> tuple[float, float]:
    low, high = float("inf"), float("-inf")
    for piece in _pieces(tensor):
        numbers = _finite(piece)
        if numbers.numel():
            low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
    return low, high


def _counts(tensor: torch.Tensor, low: float, high: float, bins: int) -> tuple[int, ...]:
    total = torch.zeros(bins, dtype=torch.float64)
    for piece in _pieces(tensor):
        total += torch.histc(_finite(piece).double(), bins=bins, min=low, max=high)
    return tuple(int(count) for count in total)
