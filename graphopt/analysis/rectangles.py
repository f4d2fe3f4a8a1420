"""What a removal has to respect where an axis was split: that the rest of every tensor is again a box.

Along two axes with positions of their own (heads and features), what stays is some rows times some columns. A *mode*
makes sure of that beforehand: every such tensor is cut along one axis, and what lies at one position of it is tied. In
each mode another tensor of a region goes first, or is cut along another axis; the others are cut along the axis that
ties least beyond that. In a mode, any set of units leaves boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from torch.fx import Node

from graphopt.analysis.labels import Classes, Labels, Slot, Trace, compact, varies
from graphopt.analysis.labels.atoms import axis_positions, settle
from graphopt.analysis.parts import Parts

__all__ = ["Mode", "Rectangles"]

_MOST_MODES = 6


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

    def cut(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """All classes, and for each the number of the slice that it lies in when the box is cut along an axis. The
        first axis is one for all tensors, the others are each tensor's own."""
        values, sets, count = [], [], 0
        for tensor in self.tensors:
            shape = [-1 if d == axis else 1 for d in range(tensor.ndim)]
            numbers = np.broadcast_to(np.arange(tensor.shape[axis]).reshape(shape) + count, tensor.shape)
            values.append(tensor.ravel())
            sets.append(numbers.ravel())
            count += tensor.shape[axis] if axis else 0
        joined, slices = np.concatenate(values), np.concatenate(sets)
        return joined[joined != 0], slices[joined != 0]


class Mode:
    """One way to keep every tensor a box: which classes go together, and which are pinned by that."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts = Parts(count + 1)  # the last number is that of -1, pinned
        self.why: dict[int, str] = {}

    def pin(self, classes: np.ndarray, why: str) -> None:
        found = np.unique(classes[classes > 0])
        self.why.update(dict.fromkeys(found.tolist(), why))
        self.parts.join(np.append(found, -1), np.zeros(found.size + 1, np.int64))

    def of(self, classes: np.ndarray) -> np.ndarray:
        """The part of each class, pinned ones -1, and 0 where there is no class."""
        roots = self.parts.find(classes)
        pinned = self.parts.find(np.array([-1]))[0]
        return np.where(classes == 0, 0, np.where(roots == pinned, -1, roots))

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """All classes that are not pinned, and the part of each."""
        classes = np.arange(1, self.count)
        parts = self.of(classes)
        return classes[parts > 0], parts[parts > 0]


class Rectangles:
    """The boxes of a model, and the modes that keep them."""

    def __init__(self, trace: Trace, classes: Classes) -> None:
        self.trace, self.classes = trace, classes
        self._boxes: list[_Box] = []
        self._sets: list[tuple[Node, np.ndarray]] = []
        self._seen: set[bytes] = set()
        self._look_at_tensors()
        for grid in trace.grids:
            box = _Box(grid.node, tuple(classes.of(one).numpy()[..., None] for one in grid.tensors))
            if box.classes.size:
                self._boxes.append(box)
        seeds = [list(_seeds(boxes)) for boxes in self._regions()]
        count = min(max(map(len, seeds), default=1), _MOST_MODES)
        self.modes = [self._mode([one[min(index, len(one) - 1)] for one in seeds]) for index in range(count)]

    def reasons(self, classes: np.ndarray) -> list[str]:
        """Why the modes pin these classes."""
        return [why for mode in self.modes for c in classes.tolist() if (why := mode.why.get(c))]

    def emptied(self, removed: np.ndarray) -> list[tuple[Node, np.ndarray]]:
        """The tensors of which nothing would be left (`removed` [classes], bool), each with its classes."""
        return [(node, classes) for node, classes in self._sets if removed[classes].all()]

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
                key = _key(thin.numpy())
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
            box = classes.permute(order).reshape([classes.shape[axis] for axis in axes] + [-1]).numpy()
            known_as = min(_key(np.moveaxis(box, range(len(axes)), turn)) for turn in permutations(range(len(axes))))
            if known_as not in self._seen:
                self._seen.add(known_as)
                self._boxes.append(_Box(node, (box,)))

    def _regions(self) -> list[list[_Box]]:
        """The boxes that have classes in common."""
        parts = Parts(self.classes.count)
        for box in self._boxes:
            parts.join(box.classes, np.zeros(box.classes.size, np.int64))
        found: dict[int, list[_Box]] = {}
        for box in self._boxes:
            found.setdefault(int(parts.find(box.classes[:1])[0]), []).append(box)
        return list(found.values())

    def _mode(self, seeds: list[tuple[_Box, int, list[_Box]]]) -> Mode:
        mode = Mode(self.classes.count)
        for first, axis, boxes in seeds:
            mode.parts.join(*first.cut(axis))
            for box in boxes:
                if box is not first:
                    mode.parts.join(*box.cut(_least_tying(mode, box)))
        for link in self.trace.links:
            self._join_link(
                mode, link.node, [self._matrix(x) for x in link.whole], [self._matrix(x) for x in link.marks]
            )
        for node, classes in self._sets:
            parts = mode.of(classes)
            if parts[0] > 0 and (parts == parts[0]).all():
                mode.pin(classes, f"'{node.name}' would have nothing left")
        return mode

    def _matrix(self, labels: Labels) -> np.ndarray:
        return self.classes.of(labels).numpy().reshape(len(labels), -1)

    @staticmethod
    def _join_link(mode: Mode, node: Node, whole: list[np.ndarray], marks: list[np.ndarray]) -> None:
        """Where what is at a place goes as one, everything at that place does; elsewhere the marks stay."""
        as_one = np.zeros(len(marks[0]), dtype=bool)
        for rows in whole:
            parts = mode.of(rows)
            some = np.where(parts == 0, parts.max(1, keepdims=True), parts)
            as_one |= (some == some[:, :1]).all(1) & (some[:, 0] != 0)
        together = np.concatenate([*whole, *marks], axis=1)
        places = np.broadcast_to(np.arange(len(together))[:, None], together.shape)
        chosen = as_one[:, None] & (together != 0)
        mode.parts.join(together[chosen], places[chosen])
        for mark in marks:
            mode.pin(mark[~as_one], f"'{node.name}' multiplies several positions there, which do not go as one")


def _key(box: np.ndarray) -> bytes:
    """Equal for equal content and shape."""
    return box.tobytes() + str(box.shape).encode()


def _seeds(boxes: list[_Box]) -> Iterator[tuple[_Box, int, list[_Box]]]:
    """Which box of a region to cut first, and along which axis: every shape of box once."""
    seen: set[tuple[int, ...]] = set()
    for box in boxes:
        shape = tuple(sorted(box.tensors[0].shape[: box.axes]))
        if shape not in seen:
            seen.add(shape)
            yield from ((box, axis, boxes) for axis in range(box.axes))


def _least_tying(mode: Mode, box: _Box) -> int:
    """The axis to cut a box along so that most parts of a mode stay apart; the longest of those that are equal."""
    return max(range(box.axes), key=lambda axis: (mode.parts.left_after(*box.cut(axis)), box.tensors[0].shape[axis]))
