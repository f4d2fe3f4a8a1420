"""Experts of a mixture as tensors: which are grouped, how their hidden units are aligned, what they are averaged to.

Li et al., Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, ICLR 2024, for groups
around the most used experts, by the similarity of router logits, and averages by usage; Ainsworth et al., Git Re-Basin,
ICLR 2023, for matching hidden units by their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Aligned", "Hidden", "average", "groups_of", "hidden_candidates", "matching"]

Expert: TypeAlias = "Sequence[Tensor]"
"""The tensors of one expert, in an order that all experts of a mixture share."""


@dataclass(frozen=True)
class Hidden:
    """Where the hidden units of an expert are: unit u of `units` has the positions u, units + u, ... of an axis, or
    with `interleaved` the positions u * n, ..., u * n + n - 1, n the size of the axis over `units`.

    Attributes:
        axes: for each tensor the axis along which hidden units lie, None where there are none.
    """

    units: int
    axes: tuple[int | None, ...]
    interleaved: bool = False

    def rows(self, expert: Expert) -> Tensor:
        """What belongs to each unit, [units, numbers], in float64."""
        parts = []
        for tensor, axis in zip(expert, self.axes, strict=True):
            if axis is not None:
                split = (self.units, -1) if self.interleaved else (-1, self.units)
                moved = tensor.detach().double().movedim(axis, 0).reshape(*split, *self._others(tensor, axis))
                parts.append((moved if self.interleaved else moved.transpose(0, 1)).reshape(self.units, -1))
        return torch.cat(parts, 1)

    def permuted(self, expert: Expert, order: Tensor) -> list[Tensor]:
        """The same expert with unit `order[u]` at the place of unit u."""
        made = []
        for tensor, axis in zip(expert, self.axes, strict=True):
            if axis is None:
                made.append(tensor)
                continue
            times = tensor.shape[axis] // self.units
            steps = torch.arange(times, device=order.device)
            if self.interleaved:
                places = (order[:, None] * times + steps).flatten()
            else:
                places = (order + steps[:, None] * self.units).flatten()
            made.append(tensor.index_select(axis, places.to(tensor.device)))
        return made

    @staticmethod
    def _others(tensor: Tensor, axis: int) -> list[int]:
        return [size for place, size in enumerate(tensor.shape) if place != axis]


@dataclass(frozen=True)
class Aligned:
    """The experts of a mixture after grouping.

    Attributes:
        groups: the members of each group, the one it was made around first.
        merged: the tensors of the expert that each group has become.
    """

    groups: tuple[tuple[int, ...], ...]
    merged: tuple[list[Tensor], ...]

    def place(self, experts: int) -> list[int]:
        """For each of the old experts the group that it is in."""
        places = {member: place for place, group in enumerate(self.groups) for member in group}
        return [places[expert] for expert in range(experts)]


def groups_of(usage: Tensor, similarity: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Groups around the `count` most used experts; each other joins the one whose router logits are most like its own.

    Args:
        usage: [experts].
        similarity: [experts, experts], cosines of the logits over all tokens.
    """
    order = torch.argsort(usage, descending=True, stable=True).tolist()
    first = sorted(order[:count])
    members: dict[int, list[int]] = {expert: [expert] for expert in first}
    for expert in sorted(order[count:]):
        members[first[int(similarity[expert, first].argmax())]].append(expert)
    return tuple(tuple(group) for group in members.values())


def matching(hidden: Hidden, reference: Expert, other: Expert) -> Tensor:
    """The order of the units of `other` that brings them nearest to those of `reference`, by the sum of squares of
    differences of all their weights: the linear assignment with the largest sum of inner products."""
    from scipy.optimize import linear_sum_assignment

    gains = hidden.rows(reference) @ hidden.rows(other).t()
    _, order = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(order))


def average(experts: Sequence[Expert], usage: Sequence[float], hidden: Hidden | None) -> list[Tensor]:
    """The mean of experts weighted by how much each is used (all alike if none is), their units in the order of the
    first one's if it is known where they are."""
    aligned = [list(experts[0])]
    for other in experts[1:]:
        aligned.append(list(other) if hidden is None else hidden.permuted(other, matching(hidden, experts[0], other)))
    total = sum(usage)
    shares = [one / total for one in usage] if total > 0 else [1 / len(experts)] * len(experts)
    merged = []
    for tensors in zip(*aligned, strict=True):
        mean = sum(share * tensor.detach().double() for share, tensor in zip(shares, tensors, strict=True))
        assert isinstance(mean, Tensor)
        merged.append(mean.to(tensors[0].dtype))
    return merged


def hidden_candidates(expert: Expert) -> Iterable[Hidden]:
    """Where hidden units may be: on one axis of the last matrix, and as many, or a multiple of them, on an axis of each
    other one; vectors before it of such a size go along. Which it is has to be tried."""
    matrices = [place for place, tensor in enumerate(expert) if tensor.dim() == 2]
    if len(matrices) < 2:
        return
    last = matrices[-1]
    for out_axis in (1, 0):
        units = expert[last].shape[out_axis]
        if units < 2:
            continue
        options = [_axes(expert, place, units) for place in matrices[:-1]]
        for chosen in product(*options):
            axes: list[int | None] = [None] * len(expert)
            for place, axis in zip(matrices, (*chosen, out_axis), strict=True):
                axes[place] = axis
            sizes = {expert[place].shape[axis] for place, axis in zip(matrices, chosen, strict=False)}
            for place, tensor in enumerate(expert[:last]):
                if tensor.dim() == 1 and tensor.shape[0] in sizes:
                    axes[place] = 0
            yield Hidden(units, tuple(axes))
            if sizes != {units}:
                yield Hidden(units, tuple(axes), interleaved=True)


def _axes(expert: Expert, place: int, units: int) -> list[int]:
    return [axis for axis in (0, 1) if expert[place].shape[axis] % units == 0]
