"""Which channels, heads and features of a model have to be removed together.

`couple(model)` labels every tensor (see `graphopt.analysis.labels`) and sorts what can be removed into groups of units:
a *unit* is the least that can go at once, a *group* holds the units that take each other's place, such as the channels
of one convolution and of all that is added to it. Where an axis is split, as heads are, units come in two families:
whole rows (a head) or one column of every row (a feature of all heads). A model loses units of one family of a group.

The idea of following removals through an index algebra instead of a rule for each operator is ours; the problem and
its name, dependency groups, are those of Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy as shallow_copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from graphopt.analysis.labels import Classes, Labels, Slot, Trace
from graphopt.analysis.parts import Parts
from graphopt.analysis.rectangles import Rectangles
from graphopt.errors import UsageError
from graphopt.names import nearest
from graphopt.printer import module_path

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["Coupling", "Group", "Member", "Pinned", "couple"]


Family: TypeAlias = tuple[tuple[int, ...], ...]
"""Units of one kind, each as the classes that go together."""


@dataclass(frozen=True)
class Member:
    """An axis of a stored tensor that loses positions with a group.

    Attributes:
        unit: [size] for each position of the axis, or [groups, size], the unit it belongs to (for each family an
            array); -1 for none.
    """

    slot: Slot
    unit: tuple[np.ndarray, ...]

    @property
    def name(self) -> str:
        return str(self.slot.tensor.target)


@dataclass(frozen=True)
class Group:
    """Units that can be removed.

    Attributes:
        name: the module that makes the positions, or the first of several.
        families: the ways to remove: each a tuple of units, a unit being the classes that go together.
        members: the axes of stored tensors that lose positions.
    """

    name: str
    families: tuple[Family, ...]
    members: tuple[Member, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Units of the finest family."""
        return max(map(len, self.families))


@dataclass(frozen=True)
class Pinned:
    """A layer whose positions all stay, and why."""

    name: str
    size: int
    reasons: tuple[str, ...]


class Coupling:
    """The groups of a model, by name, and what is pinned."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.trace = Trace(model)
        self.classes: Classes = self.trace.atoms.classes()
        self.rectangles = Rectangles(self.trace, self.classes)

    def onto(self, copy: Model) -> Coupling:
        """The same of a copy of the model, whose nodes have the same names."""
        other = shallow_copy(self)
        other.model, other.trace = copy, self.trace.onto(copy)
        return other

    def of(self, labels: Labels) -> Labels:
        """The classes of a tensor of labels: -1 pinned, 0 none."""
        return self.classes.of(labels)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """All groups, those of earlier layers first."""
        found: dict[str, Group] = {}
        for classes, families in self._sorted():
            members = tuple(self._members(classes, families))
            name = self._name(members, found.keys())
            found[name] = Group(name, families, members)
        return found

    def group(self, name: str) -> Group:
        """The group called `name`.

        Raises:
            UsageError: when there is none, with the nearest names.
        """
        if name not in self.groups:
            raise UsageError(f"there is no group '{name}'", todo=nearest(name, self.groups))
        return self.groups[name]

    @cached_property
    def pinned(self) -> tuple[Pinned, ...]:
        """The layers that lose nothing."""
        free = {c for group in self.groups.values() for family in group.families for unit in family for c in unit}
        found = []
        for node, labels in self.trace.origins.items():
            classes = self.of(labels).numpy().ravel()
            if not free.intersection(classes.tolist()):
                reasons = [str(reason) for reason in self.classes.reasons(labels)]
                reasons += self.rectangles.reasons(classes[classes > 0])
                found.append(Pinned(module_path(node) or node.name, labels.numel(), tuple(dict.fromkeys(reasons))))
        return tuple(found)

    @cached_property
    def slot_classes(self) -> list[tuple[Slot, np.ndarray]]:
        """The axes of all stored tensors that are cut somewhere or could be, and the classes along each."""
        return [(slot, self.of(slot.labels).numpy()) for slot in self._all_slots()]

    def _all_slots(self) -> Iterator[Slot]:
        """Those of layers, and the axes of tensors that are used element by element."""
        yield from self.trace.slots
        seen = {slot.tensor for slot in self.trace.slots}
        for node in self.model.graph.nodes:
            labels = self.trace.labels.get(node)
            if node.op == "get_attr" and node not in seen and labels is not None:
                yield from self.rectangles.axes_of(node)

    def _sorted(self) -> Iterator[tuple[np.ndarray, tuple[Family, ...]]]:
        """The classes of every group, and its families of units."""
        parts = Parts(self.classes.count)
        made = [self.of(labels).numpy().ravel() for labels in self.trace.origins.values()]
        made = [np.unique(classes[classes > 0]) for classes in made]
        for classes in made:
            parts.join(classes, np.zeros(classes.size, np.int64))
        modes = [mode.units() for mode in self.rectangles.modes]
        for classes, units in modes:
            parts.join(classes, units)
        group_of = parts.find(np.arange(self.classes.count))
        families: defaultdict[int, list[Family]] = defaultdict(list)
        plain = np.zeros(self.classes.count, np.int64)
        for index, (classes, units) in enumerate(modes):
            if index:  # only where this mode does otherwise than the first
                other = np.isin(group_of, group_of[classes[plain[classes] != units]])[classes]
                classes, units = classes[other], units[other]
            else:
                plain[classes] = units
            for group, family in _families(group_of[classes], classes, units):
                if len(family) > 1 and family not in families[group]:
                    families[group].append(family)
        for group in dict.fromkeys(int(group_of[classes[0]]) for classes in made if classes.size):
            if families.get(group):
                yield np.unique([c for way in families[group] for unit in way for c in unit]), tuple(families[group])

    def _members(self, classes: np.ndarray, families: tuple[Family, ...]) -> Iterator[Member]:
        tables = []
        for family in families:
            table = np.full(self.classes.count + 1, -1)  # the last place is that of -1, pinned
            for index, unit in enumerate(family):
                table[list(unit)] = index
            tables.append(table)
        for place in self._places(classes):
            slot, found = self.slot_classes[place]
            yield Member(slot, tuple(table[found] for table in tables))

    @cached_property
    def _slots_of_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a class and the place of a slot that has it, sorted by class."""
        pairs = [(np.unique(classes[classes > 0]), place) for place, (_, classes) in enumerate(self.slot_classes)]
        known = np.concatenate([classes for classes, _ in pairs] or [np.zeros(0, np.int64)])
        places = np.concatenate([np.full(classes.size, place) for classes, place in pairs] or [np.zeros(0, np.int64)])
        order = np.argsort(known, kind="stable")
        return known[order], places[order]

    def _places(self, classes: np.ndarray) -> list[int]:
        known, places = self._slots_of_class
        first, last = np.searchsorted(known, classes), np.searchsorted(known, classes, side="right")
        found = [places[a:b] for a, b in zip(first, last, strict=True)]
        return [int(place) for place in np.unique(np.concatenate(found))]

    def _name(self, members: Sequence[Member], taken: Iterable[str]) -> str:
        makers = [member for member in members if member.slot.role == "out"] or list(members)
        name = makers[0].name.rpartition(".")[0] or makers[0].name
        wanted, count = name, 1
        while name in taken:
            count += 1
            name = f"{wanted}#{count}"
        return name


def _families(groups: np.ndarray, classes: np.ndarray, units: np.ndarray) -> Iterator[tuple[int, Family]]:
    """The units of every group, in order of their first class."""
    members: defaultdict[int, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for group, c, unit in zip(groups.tolist(), classes.tolist(), units.tolist(), strict=True):
        members[group][unit].append(c)
    for group, found in members.items():
        yield group, tuple(tuple(unit) for unit in found.values())


def couple(model: Model) -> Coupling:
    """Find the groups of a model. The model stays as it is."""
    return Coupling(model)
