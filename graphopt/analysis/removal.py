"""What stays along every axis of every tensor when classes of a coupling are removed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import Node

from graphopt.analysis.labels import Labels, compact
from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.analysis.coupling import Coupling

__all__ = ["Conflict", "Kept", "Removal"]

Kept = tuple[torch.Tensor | None, ...]
"""For each axis the positions that stay, ascending; None where all do."""


class Conflict(GraphoptError):
    """A removal that would leave a tensor that is no box, or nothing of one."""


class Removal:
    """Classes to remove from the model of a coupling."""

    def __init__(self, coupling: Coupling, classes: Iterable[int]) -> None:
        self.coupling = coupling
        self.classes = frozenset(classes)
        self._gone = np.zeros(coupling.classes.count + 1, dtype=bool)  # the last place is that of -1, pinned
        self._gone[list(self.classes)] = True
        self._known: dict[int, tuple[Labels, Kept]] = {}

    def of(self, node: Node) -> Kept:
        """What stays of the tensor that a node makes.

        Raises:
            Conflict: when that is no box, or nothing.
        """
        return self.kept(self.coupling.trace.of(node), node)

    def each(self, node: Node) -> list[Kept]:
        """The same for a node that makes several tensors, or none."""
        found = self.coupling.trace.labels.get(node)
        if node.op == "get_attr":
            return [self.of(node)] if found is not None else []
        listed = found if isinstance(found, list) else [] if found is None else [found]
        return [self.kept(labels, node) for labels in listed]

    def kept(self, labels: Labels, node: Node) -> Kept:
        """What stays along the axes of a tensor of labels.

        Raises:
            Conflict: naming `node`.
        """
        if id(labels) not in self._known:
            self._known[id(labels)] = (labels, self._kept(labels, node))
        return self._known[id(labels)][1]

    def _kept(self, labels: Labels, node: Node) -> Kept:
        classes = compact(self.coupling.of(labels))
        gone = torch.from_numpy(np.asarray(self._gone[classes.numpy()]))
        if not bool(gone.any()):
            return (None,) * labels.dim()
        stays = (classes != 0) & ~gone
        masks = [_along(stays, axis) | ~_along(gone, axis) for axis in range(labels.dim())]
        box = reduce(torch.logical_and, (_place(mask, axis, labels.dim()) for axis, mask in enumerate(masks)))
        if not bool(box.any()):
            raise Conflict("nothing would be left", where=f"'{node.name}'", todo="remove less of it")
        if bool((gone & box).any()):
            raise Conflict(
                "what would be left is not some positions of each axis",
                where=f"'{node.name}'",
                todo="remove whole units of one family of a group",
            )
        return tuple(None if bool(mask.all()) else mask.nonzero().flatten() for mask in masks)


def _along(mask: torch.Tensor, axis: int) -> torch.Tensor:
    """Whether any element is set, for each position of an axis."""
    return mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1)


def _place(mask: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    return mask.reshape([-1 if d == axis else 1 for d in range(rank)])
