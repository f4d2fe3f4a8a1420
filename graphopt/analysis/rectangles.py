"""What a removal has to respect where an axis was split: that the rest of every tensor is again a box.

Along two axes with positions of their own (heads and features), what stays is some rows times some columns. A *mode*
makes sure of that beforehand: every such tensor is cut along one axis, and what lies at one position of it is tied. The
first tensor of a region, the one with the most axes, is cut along its first axis in the first mode, along its second in
the second, and so on; the others along the axis that ties least beyond that. In a mode, any set of units leaves boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from networkx.utils import UnionFind
from torch.fx import Node

from graphopt.analysis.labels import Classes, Labels, Link, Slot, Trace, compact, varies
from graphopt.analysis.labels.atoms import axis_positions, settle

__all__ = ["Mode", "Rectangles"]

_PINNED = -1

@dataclass(frozen=True)
class _Box:
    """Tensors of classes [first, second, ..., rest] whose first axis is cut in the same places; `node` is where."""

    node: Node
    tensors: tuple[np.ndarray, ...]

    @property
    def axes(self) -> int:
        return self.tensors[0].ndim - 1

    @property
    def classes(self) -> np.ndarray:
        found = np.unique(np.concatenate([tensor.ravel() for tensor in self.tensors]))
        return found[found > 0]

    def slices(self, axis: int) -> Iterator[np.ndarray]:
        """What has to go together when the box is cut along an axis: all tensors along the first, each along others."""
        if axis == 0:
            for place in range(len(self.tensors[0])):
                yield np.concatenate([tensor[place].ravel() for tensor in self.tensors])
        else:
            for tensor in self.tensors:
                yield from (part.ravel() for part in np.moveaxis(tensor, axis, 0))


class Mode:
    """One way to keep every tensor a box: ties between classes, and those that are pinned by them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts = UnionFind(range(-1, count))
        self.why: dict[int, str] = {}

    def tie(self, classes: np.ndarray) -> None:
        """Classes that go together; with a pinned one among them, all stay."""
        found = np.unique(classes[classes != 0]).tolist()
        if len(found) > 1:
            self.parts.union(*found)

    def pin(self, classes: np.ndarray, why: str) -> None:
        for c in np.unique(classes[classes > 0]).tolist():
            self.why.setdefault(c, why)
            self.parts.union(c, _PINNED)

    def roots(self, classes: np.ndarray) -> set[int]:
        """The parts that classes belong to, zeros left out."""
        return {self.parts[c] for c in np.unique(classes[classes != 0]).tolist()}

    def units(self) -> Iterator[tuple[int, ...]]:
        """The classes of every part that is not pinned."""
        members: defaultdict[int, list[int]] = defaultdict(list)
        for c in range(1, self.count):
            members[self.parts[c]].append(c)
        pinned = self.parts[_PINNED]
        yield from (tuple(classes) for root, classes in members.items() if root != pinned)


class Rectangles:
    """The boxes of a model, and the modes that keep them."""

    def __init__(self, trace: Trace, classes: Classes) -> None:
        self.trace, self.classes = trace, classes
        self._boxes: list[_Box] = []
        self._sets: list[tuple[Node, np.ndarray]] = []
        self._look_at_tensors()
        for grid in trace.grids:
            self._boxes.append(_Box(grid.node, tuple(classes.of(one).numpy()[..., None] for one in grid.tensors)))
        links = [self._link(link) for link in trace.links]
        regions = self._regions()
        self.modes = [
            self._mode(links, regions, axis) for axis in range(max((box.axes for box in self._boxes), default=1))
        ]

    def reasons(self, classes: np.ndarray) -> list[str]:
        """Why the modes pin these classes."""
        return [why for mode in self.modes for c in classes.tolist() if (why := mode.why.get(c))]

    def axes_of(self, node: Node) -> Iterator[Slot]:
        """The axes of a stored tensor that is used element by element."""
        labels = self.trace.of(node)
        classes = settle(self.classes.of(labels))
        for axis in range(labels.dim()):
            if varies(classes, (axis,)):
                yield Slot(node, axis, axis_positions(labels, axis), "scale", node)

    def _look_at_tensors(self) -> None:
        """Sort the tensors with positions along two axes or more from the others; each content once."""
        seen: set[bytes] = set()
        for node, found in self.trace.labels.items():
            for labels in found if isinstance(found, list) else [found]:
                if labels is None or not labels.numel():
                    continue
                thin = compact(labels)
                key = thin.numpy().tobytes() + str(tuple(thin.shape)).encode()
                if key not in seen:
                    seen.add(key)
                    self._look_at(node, thin)

    def _look_at(self, node: Node, labels: Labels) -> None:
        classes = compact(settle(self.classes.of(labels)))
        if not bool((classes > 0).any()):
            return
        known = classes[classes != 0].unique().numpy()
        if known[0] > 0:
            self._sets.append((node, known))
        axes = [axis for axis in range(classes.dim()) if varies(classes, (axis,))]
        if len(axes) > 1:
            order = [*axes, *(axis for axis in range(classes.dim()) if axis not in axes)]
            flat = classes.permute(order)
            self._boxes.append(_Box(node, (flat.reshape([classes.shape[axis] for axis in axes] + [-1]).numpy(),)))

    def _link(self, link: Link) -> tuple[Node, list[np.ndarray], list[np.ndarray]]:
        return (
            link.node,
            [self.classes.of(one).numpy() for one in link.whole],
            [self.classes.of(one).numpy() for one in link.marks],
        )

    def _regions(self) -> list[list[_Box]]:
        """The boxes that have classes in common, those with the most axes first."""
        parts = UnionFind()
        for box in self._boxes:
            parts.union(*box.classes.tolist())
        found: defaultdict[int, list[_Box]] = defaultdict(list)
        for box in self._boxes:
            found[parts[int(box.classes[0])]].append(box)
        return [sorted(boxes, key=lambda box: -box.axes) for boxes in found.values()]

    def _mode(
        self, links: list[tuple[Node, list[np.ndarray], list[np.ndarray]]], regions: list[list[_Box]], axis: int
    ) -> Mode:
        mode = Mode(self.classes.count)
        for first, *others in regions:
            for part in first.slices(min(axis, first.axes - 1)):
                mode.tie(part)
            for box in others:
                for part in box.slices(_least_tying(mode, box)):
                    mode.tie(part)
        for node, whole, marks in links:
            for place in range(len(marks[0])):
                rows, known = [one[place] for one in whole], np.array([one[place] for one in marks])
                if any(len(mode.roots(row)) == 1 for row in rows):
                    mode.tie(np.concatenate([*rows, known]))
                else:
                    mode.pin(known, f"'{node.name}' multiplies several positions there, which do not go as one")
        for node, classes in self._sets:
            if len(mode.roots(classes)) == 1:
                mode.pin(classes, f"'{node.name}' would have nothing left")
        return mode


def _least_tying(mode: Mode, box: _Box) -> int:
    """The axis to cut a box along so that most parts of a mode stay apart; the longest of those that are equal."""

    def apart(axis: int) -> tuple[int, int]:
        parts = UnionFind(mode.roots(box.classes))
        for part in box.slices(axis):
            parts.union(*mode.roots(part[part > 0]))
        return len(list(parts.to_sets())), box.tensors[0].shape[axis]

    return max(range(box.axes), key=apart)
