"""Atoms, what ties them and what pins them, and questions about tensors of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch.fx import Node

from graphopt.printer import module_path

__all__ = [
    "Atoms",
    "Classes",
    "Labels",
    "Reason",
    "axis_positions",
    "collapse",
    "compact",
    "settle",
    "uniform",
    "varies",
]

Labels: TypeAlias = torch.Tensor
"""int64, of the shape of the tensor that it describes; axes along which nothing changes have stride 0."""

_LOWEST, _HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Reason:
    """Why atoms stay: what the node called `node`, in the module at `path`, does with them."""

    node: str
    path: str
    why: str

    def __str__(self) -> str:
        return f"'{self.node}'{f' in {self.path}' if self.path else ''} {self.why}"


@dataclass(frozen=True)
class Classes:
    """Atoms that are removed together, as one number each.

    Attributes:
        of_atom: [atoms] the class of each atom, from 1 on; -1 where the class is pinned; 0 at index 0.
        count: how many classes there are that are not pinned, plus one.
        reasons: [atoms] for each atom of a pinned class the numbers of the reasons, as an index into `why`.
        why: the reasons of every pinned class.
    """

    of_atom: np.ndarray
    count: int
    pinned_class: np.ndarray
    why: tuple[tuple[Reason, ...], ...]

    def of(self, labels: Labels) -> Labels:
        """The classes of a tensor of labels: 0 and pinned ones (as -1) included."""
        thin = compact(labels)
        found = torch.from_numpy(np.asarray(self.of_atom[thin.clamp(min=0).numpy()]))
        return torch.where(thin < 0, -1, found).expand(labels.shape)

    def reasons(self, labels: Labels) -> tuple[Reason, ...]:
        """Why the atoms among these labels that are pinned are so, each reason once."""
        atoms = np.unique(compact(labels).numpy())
        kinds = np.unique(self.pinned_class[atoms[atoms > 0]])
        found = (reason for kind in kinds[kinds >= 0] for reason in self.why[kind])
        return tuple(dict.fromkeys(found))


class Atoms:
    """Makes atoms and notes which of them belong together or have to stay."""

    def __init__(self) -> None:
        self.count = 1
        self.reasons: list[Reason] = [Reason("", "", "")]
        self._pairs: list[np.ndarray] = []
        self._pins: list[np.ndarray] = []

    def fresh(self, *sizes: int) -> Labels:
        """New atoms, one for each element."""
        number = int(np.prod(sizes))
        made = torch.arange(self.count, self.count + number).reshape(sizes)
        self.count += number
        return made

    def pinned(self, node: Node, why: str) -> int:
        """A new pinned label."""
        self.reasons.append(Reason(node.name, module_path(node) or "", why))
        return 1 - len(self.reasons)

    def pin(self, labels: Labels, node: Node, why: str) -> None:
        """Let the atoms among these labels stay for good."""
        atoms = np.unique(compact(labels).numpy())
        atoms = atoms[atoms > 0]
        if atoms.size:
            self._pins.append(np.stack([np.full_like(atoms, -self.pinned(node, why)), atoms]))

    def tie(self, a: Labels, b: Labels) -> None:
        """Let the atoms at equal places be removed together; a pinned one pins the other. Zeros tie nothing."""
        a, b = torch.broadcast_tensors(a, b)
        still = [axis for axis in range(a.dim()) if a.stride(axis) == 0 and b.stride(axis) == 0 and a.shape[axis]]
        for axis in still:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        told = (x != 0) & (y != 0) & (x != y)
        if not told.any():
            return
        width = self.count + len(self.reasons)  # one number for a pair is found again faster than two
        codes = np.unique((np.minimum(x[told], y[told]) + width) * (2 * width) + np.maximum(x[told], y[told]) + width)
        pairs = np.stack([codes // (2 * width) - width, codes % (2 * width) - width])
        pins = (pairs[0] < 0) & (pairs[1] > 0)
        if pins.any():
            self._pins.append(np.stack([-pairs[0][pins], pairs[1][pins]]))
        joins = pairs[0] > 0
        if joins.any():
            self._pairs.append(pairs[:, joins])

    def tie_along(self, labels: Labels, axis: int) -> Labels:
        """Tie all elements that share their position along `axis`; returns one label for each position, [size]."""
        found = axis_positions(labels, axis)
        self.tie(labels, found.reshape([-1 if d == axis else 1 for d in range(labels.dim())]))
        return found

    def classes(self) -> Classes:
        """What the ties and pins so far amount to."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._pairs, axis=1) if self._pairs else np.zeros((2, 0), np.int64)
        pins = np.concatenate(self._pins, axis=1) if self._pins else np.zeros((2, 0), np.int64)
        graph = coo_matrix((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(self.count, self.count))
        _, parts = connected_components(graph, directed=False)
        pinned, where = np.unique(parts[pins[1]], return_inverse=True)
        codes = np.unique(where.reshape(-1) * len(self.reasons) + pins[0])
        places, numbers = codes // len(self.reasons), codes % len(self.reasons)
        lists = np.split(numbers, np.searchsorted(places, np.arange(1, pinned.size))) if pinned.size else []
        why = tuple(tuple(self.reasons[number] for number in found) for found in lists)
        pinned_class = np.full(parts.max() + 1, -1)
        pinned_class[pinned] = np.arange(pinned.size)
        free = np.setdiff1d(parts[1:], pinned)
        new = np.full(parts.max() + 1, -1)
        new[free] = np.arange(1, free.size + 1)
        of_atom, of_pinned = new[parts], pinned_class[parts]
        of_atom[0], of_pinned[0] = 0, -1
        return Classes(of_atom, free.size + 1, of_pinned, why)


def uniform(label: int, shape: Sequence[int]) -> Labels:
    """The same label everywhere."""
    return torch.full((1,) * len(shape), label, dtype=torch.int64).expand(tuple(shape))


def compact(labels: Labels) -> Labels:
    """The labels with the axes of stride 0 cut to a size of one."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def varies(labels: Labels, axes: Iterable[int]) -> bool:
    """Whether along any of the axes the labels change, zeros left out."""
    return any(_changes(labels, axis) for axis in axes)


def _changes(labels: Labels, axis: int) -> bool:
    if labels.shape[axis] < 2 or labels.stride(axis) == 0 or not labels.numel():
        return False
    thin = compact(labels)
    highest = torch.where(thin == 0, _LOWEST, thin).amax(axis)
    lowest = torch.where(thin == 0, _HIGHEST, thin).amin(axis)
    return bool((highest > lowest).any())


def collapse(labels: Labels, axes: Iterable[int]) -> Labels:
    """One label in the place of all along the axes, which stay with a size of one; zero only where all are."""
    for axis in axes:
        if labels.shape[axis] == 1:
            continue
        if labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
        else:
            highest = labels.amax(axis, keepdim=True)
            labels = torch.where(highest == 0, labels.amin(axis, keepdim=True), highest)
    return labels


def axis_positions(labels: Labels, axis: int) -> Labels:
    """One label for every position along an axis, [size]."""
    thin = collapse(labels, (other for other in range(labels.dim()) if other != axis))
    return thin.reshape(-1).expand(labels.shape[axis]) if thin.numel() == 1 else thin.reshape(-1)


def settle(labels: Labels) -> Labels:
    """The same labels with stride 0 along every axis on which nothing changes."""
    shape = labels.shape
    if not labels.numel():
        return labels
    for axis, size in enumerate(shape):
        if size > 1 and labels.stride(axis) != 0:
            first = compact(labels).narrow(axis, 0, 1)
            if torch.equal(compact(labels), first.expand_as(compact(labels))):
                labels = labels.narrow(axis, 0, 1)
    return labels.expand(shape)
