"""Which units of a model an expansion copies: of MLPs, of attention, of the stream that residual branches add to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from graphopt.analysis.coupling import Coupling, Group
from graphopt.analysis.labels import compact, varies
from graphopt.errors import UsageError
from graphopt.names import nearest
from graphopt.ops import Normalized, Reduced, argument, lookup, operands
from graphopt.passes._expansion_rules import ATTENTION, terms_of
from graphopt.rewriter import Node

__all__ = ["Part", "Site", "attention_calls", "chosen", "sites"]

Part: TypeAlias = Literal["mlp", "heads", "head-size", "attention", "hidden"]


@dataclass(frozen=True)
class Site:
    """A unit that stands for the others of its kind in a group: the last.

    Attributes:
        name: of the group.
        unit: its classes.
        size: how many of the kind there are.
        each: how many a copy adds; more than one where the unit is all of them.
    """

    name: str
    unit: tuple[int, ...]
    size: int
    each: int = 1


def sites(coupling: Coupling, part: Part) -> dict[str, Site]:
    """The units of a kind, by the names of their groups, in order."""
    attention: dict[str, list[tuple[str, tuple[int, ...], int]]] = {}
    for kind, classes, size in _attended(coupling):
        for group in coupling.groups.values():
            unit = _unit_with(group, classes[-1])
            if unit is not None:
                count = size // max(1, sum(bool(set(unit) & one) for one in classes))
                attention.setdefault(group.name, []).append((kind, unit, count))
    if part in ("heads", "head-size", "attention"):
        kept = {name: [row[1:] for row in rows if row[0] == part] for name, rows in attention.items()}
        return {name: Site(name, *rows[0]) for name, rows in kept.items() if rows}
    streams = _streams(coupling)
    if part == "hidden":
        groups = [group for name, group in coupling.groups.items() if name in streams and name not in attention]
        return {group.name: _whole(group) for group in groups}
    groups = [group for name, group in coupling.groups.items() if name not in streams and name not in attention]
    return {group.name: Site(group.name, group.families[0][-1], len(group.families[0])) for group in groups}


def _whole(group: Group) -> Site:
    units = group.families[0]
    return Site(group.name, tuple(c for unit in units for c in unit), len(units), each=len(units))


def attention_calls(coupling: Coupling) -> list[Node]:
    """Attention as one operator, and products of two computed tensors."""
    calls = [node for node in coupling.model.graph.nodes if node.op == "call_function"]
    return [node for node in calls if str(node.target) == ATTENTION or terms_of(coupling.trace, node) is not None]


def _attended(coupling: Coupling) -> Iterator[tuple[Part, list[set[int]], int]]:
    """Axes of queries and values: what is along them, the classes at every position, and how many there are."""
    trace = coupling.trace
    for node in attention_calls(coupling):
        axes: list[tuple[Part, Node, int]] = []
        if str(node.target) == ATTENTION:
            query, value = argument(node, "query"), argument(node, "value")
            rank = len(trace.sizes(query))
            axes = [("heads", query, axis) for axis in range(rank - 2)]
            axes += [("attention", query, rank - 1), ("head-size", value, rank - 1)]
        elif (terms := terms_of(trace, node)) is not None:
            left, right = operands(node)
            axes = [("heads", left, terms.left.index(letter)) for letter in terms.batch]
            axes += [("attention", left, terms.left.index(letter)) for letter in terms.inner]
            axes += [("head-size", right, terms.right.index(letter)) for letter in terms.free(terms.right)]
        for part, operand, axis in axes:
            classes = compact(coupling.of(trace.of(operand)))
            if varies(classes, (axis,)):
                rows = classes.movedim(axis, 0).flatten(1)
                yield part, [set(row[row > 0].tolist()) for row in rows], len(rows)


def _unit_with(group: Group, classes: set[int]) -> tuple[int, ...] | None:
    """The unit that holds classes, of a group that has them."""
    units = (unit for family in group.families for unit in family)
    return next((unit for unit in units if classes and classes.issubset(unit)), None)


def _streams(coupling: Coupling) -> set[str]:
    """The groups whose positions are added up from several branches, or normalised over."""
    of_class = np.full(coupling.classes.count + 1, -1)
    names = list(coupling.groups)
    for index, group in enumerate(coupling.groups.values()):
        of_class[[c for family in group.families for unit in family for c in unit]] = index
    found: set[int] = set()
    for node in coupling.model.graph.nodes:
        for operand, axes in _gathered(coupling, node):
            classes = compact(coupling.of(coupling.trace.of(operand)))
            if varies(classes, axes):
                found.update(of_class[np.unique(classes.numpy())].tolist())
    return {names[index] for index in found if index >= 0}


def _gathered(coupling: Coupling, node: Node) -> Iterator[tuple[Node, Iterable[int]]]:
    """The operands that a residual sum adds, or of which a statistic is taken, and over which axes."""
    info = lookup(node.target) if node.op == "call_function" else None
    if info is None:
        return
    if isinstance(info.axes, Normalized | Reduced):
        source = argument(node, "input" if isinstance(info.axes, Normalized) else "self")
        if isinstance(coupling.trace.labels.get(source), torch.Tensor):
            yield source, info.axes.mixed(node) or ()
    elif node.target is torch.ops.aten.add.Tensor:
        labels = [coupling.trace.labels.get(used) for used in node.all_input_nodes if used.op == "call_function"]
        # A function such as x + x ** 3 adds up what comes from one layer, and has the same labels twice.
        if len(labels) == 2 and _differ(labels[0], labels[1]):
            yield node, range(len(coupling.trace.sizes(node)))


def _differ(a: object, b: object) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and not torch.equal(compact(a), compact(b))


def chosen(names: Sequence[str], only: Sequence[str], leave: Sequence[str]) -> list[str]:
    """Those groups that are, or are in, one of the modules `only`, if any are given, and none of `leave`.

    Raises:
        UsageError: when a name is that of none.
    """

    def meant(name: str) -> set[str]:
        found = {one for one in names if one == name or one.startswith((f"{name}.", f"{name}#"))}
        if not found:
            todo = nearest(name, names) if names else "leave the option out"
            raise UsageError(f"nothing that could be expanded is called '{name}'", todo=todo)
        return found

    wanted = {one for name in only for one in meant(name)} or set(names)
    left = {one for name in leave for one in meant(name)}
    return [name for name in names if name in wanted - left]
