"""How the positions of one tensor became those of another: left out, put in another order, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["permutation", "slices"]

_MOST = 1 << 24
"""Tensors of more elements are not searched for two sliced axes at once, which takes sorting them."""
_KEY = 16
_TRIES = 4


def slices(large: torch.Tensor, small: torch.Tensor) -> dict[int, tuple[int, ...]] | None:
    """For every axis that is shorter in `small`, the positions of `large` that it keeps, in its order; None when
    `small` is no such part.
    """
    if large.dim() != small.dim() or large.dtype != small.dtype or not small.numel():
        return None
    axes = [axis for axis in range(large.dim()) if large.shape[axis] != small.shape[axis]]
    if not axes or any(small.shape[axis] > large.shape[axis] for axis in axes):
        return None
    large, small = large.detach(), small.detach()
    if len(axes) == 1:
        kept = _kept(_keys(large, axes[0]), _keys(small, axes[0]))
        found = None if kept is None else {axes[0]: kept}
    elif len(axes) == 2 and large.numel() <= _MOST:
        found = _two_axes(large, small, axes[0], axes[1])
    else:
        found = None
    return found if found is not None and torch.equal(_take(large, found), small) else None


def _take(tensor: torch.Tensor, kept: dict[int, tuple[int, ...]]) -> torch.Tensor:
    for axis, positions in kept.items():
        tensor = tensor.index_select(axis, torch.tensor(positions, dtype=torch.int64))
    return tensor


def _keys(tensor: torch.Tensor, axis: int) -> list[bytes]:
    """Some elements of every position of an axis: the same ones in tensors that differ along this axis only."""
    rows = tensor.movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    step = max(rows.shape[1] // _KEY, 1)
    part = rows[:, ::step][:, : 2 * _KEY]
    data, width = part.reshape(-1).clone().view(torch.uint8).numpy().tobytes(), part.shape[1] * part.element_size()
    return [data[start : start + width] for start in range(0, len(data), width)]


def _kept(large: Sequence[bytes], small: Sequence[bytes]) -> tuple[int, ...] | None:
    """Where the positions of `small` stand in `large`: in order if possible, else anywhere but each one once."""
    found: list[int] = []
    at = 0
    for key in small:
        while at < len(large) and large[at] != key:
            at += 1
        if at == len(large):
            break
        found.append(at)
        at += 1
    if len(found) == len(small):
        return tuple(found)
    places: dict[bytes, list[int]] = {}
    for position in range(len(large) - 1, -1, -1):
        places.setdefault(large[position], []).append(position)
    if not all(places.get(key) for key in small):
        return None
    try:
        return tuple(places[key].pop() for key in small)
    except IndexError:
        return None


def _two_axes(large: torch.Tensor, small: torch.Tensor, first: int, second: int) -> dict[int, tuple[int, ...]] | None:
    """Both axes at once: the numbers of one row are looked up in the whole, which gives the kept columns."""
    plane_l, plane_s = _plane(large, first, second), _plane(small, first, second)
    order = torch.argsort(plane_l.reshape(-1), stable=True)
    values = plane_l.reshape(-1)[order]
    for row in range(0, plane_s.shape[0], max(plane_s.shape[0] // _TRIES, 1)):
        columns = _columns(values, order, plane_s[row], plane_l.shape[1])
        if columns is None:
            continue
        part = large.index_select(second, torch.tensor(columns, dtype=torch.int64))
        rows = _kept(_keys(part, first), _keys(small, first))
        if rows is not None:
            return {first: rows, second: columns}
    return None


def _plane(tensor: torch.Tensor, first: int, second: int) -> torch.Tensor:
    plane = tensor.movedim((first, second), (0, 1)).flatten(2)[..., 0] if tensor.dim() > 2 else tensor
    return plane if plane.dtype.is_floating_point and plane.dtype.itemsize >= 4 else plane.to(torch.float64)


def _columns(values: torch.Tensor, order: torch.Tensor, row: torch.Tensor, width: int) -> tuple[int, ...] | None:
    """The columns of the one row of the large plane that holds all these values; None when they are ambiguous."""
    places = torch.searchsorted(values, row.contiguous())
    places.clamp_(max=len(values) - 1)
    ends = torch.searchsorted(values, row.contiguous(), right=True)
    if not torch.equal(values[places], row) or bool((ends - places != 1).any()):
        return None
    found = order[places]
    if bool((found // width != found[0] // width).any()):
        return None
    return tuple((found % width).tolist())


def permutation(a: torch.Tensor, b: torch.Tensor) -> dict[int, tuple[int, ...]] | None:
    """For axes 0 and 1, the position of `a` that stands at each position of `b`, where that differs; None when `b`
    is not `a` in another order.
    """
    a, b = a.detach(), b.detach()
    if a.dim() == 0 or a.dtype.is_complex or a.dtype == torch.bool:
        return None
    maps: dict[int, tuple[int, ...]] = {}
    for axis in range(min(a.dim(), 2)):
        ends_a, ends_b = _extremes(a, axis), _extremes(b, axis)
        if not torch.equal(*(ends[0].sort().values for ends in (ends_a, ends_b))):
            return None
        order = _order(*(list(zip(*(end.tolist() for end in ends), strict=True)) for ends in (ends_a, ends_b)))
        if order is None:
            return None
        if order != tuple(range(len(order))):
            maps[axis] = order
    return maps if maps and torch.equal(_take(a, maps), b) else None


def _extremes(tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest and the smallest number at every position: no order of the other axes changes them."""
    rows = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
    if not rows.dtype.is_floating_point or rows.dtype.itemsize < 4:
        rows = rows.to(torch.float64)
    return rows.amax(1), rows.amin(1)


def _order(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> tuple[int, ...] | None:
    places: dict[tuple[float, float], list[int]] = {}
    for position in range(len(a) - 1, -1, -1):
        places.setdefault(a[position], []).append(position)
    try:
        # A position that stays equal stays where it is, so that rows which are alike are not shuffled.
        return tuple(places[key].pop() for key in b)
    except (KeyError, IndexError):
        return None
