"""The walk over a graph that gives every tensor its labels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import copy as shallow_copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import fx
from torch.fx import Node

from graphopt.analysis.labels import axes, elementwise, indexing, layers, movement, products
from graphopt.analysis.labels.atoms import Atoms, Labels, uniform
from graphopt.fake import example_number
from graphopt.model import output_leaves
from graphopt.ops import (
    Along,
    Axes,
    Broadcast,
    Contracted,
    Created,
    Indexed,
    Moved,
    Normalized,
    OpInfo,
    Product,
    Reduced,
    Windowed,
    is_pure,
    lookup,
)
from graphopt.params import ParamKind

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["Grid", "Link", "Role", "Slot", "Trace"]

Role = Literal["in", "out", "scale"]
Traced: TypeAlias = "Labels | list[Labels] | None"

_MOST_LABELS = 1 << 22
"""Elements of a stored tensor that get an atom each; a larger one that is used element by element is pinned."""

_PERMUTATIONS = frozenset({"aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.numpy_T.default"})


@dataclass(frozen=True)
class Slot:
    """An axis of a stored tensor and the labels along it.

    Attributes:
        tensor: the node that stands for it.
        labels: [size], or [groups, size] where every group reads the same positions of the tensor.
        role: whether the axis is read (`in`), makes new positions (`out`), or scales positions (`scale`).
        user: the layer.
    """

    tensor: Node
    axis: int
    labels: Labels
    role: Role
    user: Node


@dataclass(frozen=True)
class Grid:
    """Tensors of labels [rows, columns] of which what stays has to be rows times columns; the rows that stay are the
    same for all."""

    node: Node
    tensors: tuple[Labels, ...]


@dataclass(frozen=True)
class Link:
    """Positions of a batch [n, ...]: one of them vanishes from all the tensors or from none.

    `whole` are the labels of what is at a position, [n, size]; `marks` those of what knows it only as one, [n].
    """

    node: Node
    whole: tuple[Labels, ...]
    marks: tuple[Labels, ...]


class Trace:
    """The labels of a model, and what was learnt on the way.

    Attributes:
        labels: of every node that makes tensors; a list where it makes several.
        slots: the axes of stored tensors.
        grids, links: what removals have to respect.
        origins: the atoms that each layer has made, as one tensor a layer.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.atoms = model, Atoms()
        self.labels: dict[Node, Traced] = {}
        self.slots: list[Slot] = []
        self.grids: list[Grid] = []
        self.links: list[Link] = []
        self.origins: dict[Node, Labels] = {}
        self._values: dict[Node, torch.Tensor] = {}
        for node in model.graph.nodes:
            self._visit(node)
        self._join_uses()

    def onto(self, copy: Model) -> Trace:
        """The same of a copy of the model, whose nodes have the same names. It may lack some: a copy in evaluation mode
        does not count batches."""
        named = {node.name: node for node in copy.graph.nodes}
        other = shallow_copy(self)
        other.model = copy
        other.labels = {named[node.name]: labels for node, labels in self.labels.items() if node.name in named}
        other._values = {named[node.name]: value for node, value in self._values.items() if node.name in named}
        other.slots = [replace(slot, tensor=named[slot.tensor.name], user=named[slot.user.name]) for slot in self.slots]
        return other

    # What rules ask

    def of(self, node: Node) -> Labels:
        """The labels of a node that makes one tensor."""
        if node not in self.labels and node.op == "get_attr":
            self.labels[node] = self._stored_labels(node)
        found = self.labels[node]
        assert isinstance(found, torch.Tensor), f"{node} makes no single tensor"
        return found

    def set(self, node: Node, labels: Labels) -> None:
        """Say the same of a node in simpler terms, once ties allow it."""
        self.labels[node] = labels

    def sizes(self, value: Any) -> tuple[int, ...]:
        """The shape of a tensor, or of the one that a node makes, at the sizes of the example."""
        tensor = value.meta["val"] if isinstance(value, Node) else value
        return tuple(self.number(size) for size in tensor.shape)

    def number(self, value: Any) -> Any:
        """A size as a number; anything else as it is."""
        if isinstance(value, Node):
            value = value.meta.get("val")
        return example_number(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value

    def value(self, node: Any) -> torch.Tensor | None:
        """The elements of a constant tensor of whole numbers, as far as they are known now."""
        if not isinstance(node, Node):
            return None
        return self._values[node] if node in self._values or self._constant(node) else None

    def stored(self, node: Any) -> tuple[Node, tuple[int, ...]] | None:
        """The stored tensor that a node reads or transposes, and which of its axes each axis of the node is."""
        if not isinstance(node, Node):
            return None
        if node.op == "get_attr":
            return node, tuple(range(len(self.sizes(node))))
        if str(node.target) not in _PERMUTATIONS:
            return None
        inner = self.stored(node.args[0])
        if inner is None:
            return None
        marks = torch.empty(tuple(range(2, 2 + len(inner[1]))), device="meta")  # every axis is known by its size
        moved = node.target(marks, *node.args[1:], **node.kwargs)  # type: ignore[operator]  # an overload
        return inner[0], tuple(inner[1][size - 2] for size in moved.shape)

    # What rules say

    def slot(self, stored: tuple[Node, tuple[int, ...]], axis: int, labels: Labels, role: Role, user: Node) -> None:
        """Note the labels along an axis of a stored tensor, as seen through its transpositions."""
        self.slots.append(Slot(stored[0], stored[1][axis], labels, role, user))

    def keep_axis(self, stored: tuple[Node, tuple[int, ...]], axis: int, user: Node, why: str) -> None:
        """Note that an axis of a stored tensor stays as it is."""
        size = self.sizes(stored[0])[stored[1][axis]]
        self.slot(stored, axis, uniform(self.atoms.pinned(user, why), (size,)), "in", user)

    def add_grid(self, node: Node, *tensors: Labels) -> None:
        """Note tensors [rows, columns] of which rows and columns are removed, the same rows of all."""
        self.grids.append(Grid(node, tensors))

    def add_link(self, node: Node, whole: list[Labels], marks: list[Labels]) -> None:
        """Note what stands at the positions of a batch (see `Link`)."""
        self.links.append(Link(node, tuple(whole), tuple(marks)))

    def made(self, node: Node, size: int) -> Labels:
        """New atoms for the positions that a layer makes, [size]."""
        labels = self.atoms.fresh(size)
        self.origins[node] = labels
        return labels

    def barrier(self, node: Node, why: str) -> Traced:
        """Pin all that goes into a node and all that comes out."""
        pinned = self.atoms.pinned(node, why)
        for used in node.all_input_nodes:
            if used.op == "get_attr" and used not in self.labels:
                self.labels[used] = uniform(pinned, self.sizes(used))  # no atom for each of its elements
            for labels in self._tensors(used):
                self.atoms.pin(labels, node, why)
        return self.like(node, lambda shape: uniform(pinned, shape))

    def like(self, node: Node, make: Callable[[tuple[int, ...]], Labels]) -> Traced:
        """`make` for the shape of every tensor that a node makes."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return make(self.sizes(value))
        if isinstance(value, tuple | list):
            return [make(self.sizes(v)) if isinstance(v, torch.Tensor) else uniform(0, ()) for v in value]
        return None

    # The walk

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self.labels[node] = self.like(node, lambda shape: uniform(self.atoms.pinned(node, "is an input"), shape))
        elif node.op == "call_function":
            self.labels[node] = self._call(node)
        elif node.op == "output":
            for leaf in output_leaves(self.model.graph):
                if isinstance(leaf, Node):
                    for labels in self._tensors(leaf):
                        self.atoms.pin(labels, leaf, "is an output")

    def _call(self, node: Node) -> Traced:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor | tuple | list):
            return None  # a size
        if node.target is operator.getitem:
            source = self.labels[node.args[0]]  # type: ignore[index]  # a node
            return source[node.args[1]] if isinstance(source, list) else None  # type: ignore[index]  # an int
        info = lookup(node.target)
        if info is None:
            return self.barrier(node, "is an operator that is not known")
        if self._evaluate(node):
            return uniform(0, self.sizes(node))
        rule = _RULES.get(type(info.axes))
        if rule is None:
            return self.barrier(node, "is an operator about whose axes nothing is known")
        return rule(self, node, info)

    def _evaluate(self, node: Node) -> bool:
        """Compute a small constant of whole numbers that no size is part of; says whether that was possible."""
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
            return False
        inputs = node.all_input_nodes
        known = all(used in self._values or self._constant(used) for used in inputs) and is_pure(node)
        if not known or value.device.type == "meta" or any(not isinstance(s, int) for s in value.shape):
            return False
        if value.numel() > _MOST_LABELS:
            return False
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: self._values[used])
        with torch.no_grad():
            made = node.target(*args, **kwargs)  # type: ignore[operator]  # an overload
        self._values[node] = made.cpu()
        return True

    def _constant(self, node: Node) -> bool:
        """Whether a node is a stored tensor of whole numbers; its elements are known from now on."""
        if node.op != "get_attr":
            return False
        name = str(node.target)
        tensor = self.model.params[name]
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.device.type == "meta":
            return False
        if self.model.params.kind(name) is ParamKind.PARAMETER:
            return False
        self._values[node] = tensor.detach().cpu()
        return True

    def _tensors(self, node: Node) -> list[Labels]:
        """The labels of every tensor that a node makes; none for a size, or for a stored tensor not yet labelled."""
        if node.op == "get_attr":
            return [self.of(node)]
        found = self.labels.get(node)
        return [found] if isinstance(found, torch.Tensor) else list(found or ())

    def _stored_labels(self, node: Node) -> Labels:
        """An atom for each element of a stored tensor; whole numbers are constants."""
        if self._constant(node) or not node.meta["val"].dtype.is_floating_point:
            return uniform(0, self.sizes(node))
        sizes = self.sizes(node)
        if torch.Size(sizes).numel() > _MOST_LABELS:
            return uniform(self.atoms.pinned(node, "is large and used element by element"), sizes)
        return self.atoms.fresh(*sizes)

    def _join_uses(self) -> None:
        """One tensor that is used several times, or under several names, is cut in one way."""
        first: dict[tuple[int, int], Labels] = {}
        for slot in self.slots:
            key = (id(self.model.params[str(slot.tensor.target)]), slot.axis)
            if key in first:
                self.atoms.tie(slot.labels, first[key])
            else:
                first[key] = slot.labels
        whole: dict[int, Labels] = {}
        for node in [n for n in self.labels if n.op == "get_attr"]:
            tensor, labels = id(self.model.params[str(node.target)]), self.of(node)
            if tensor in whole:
                self.atoms.tie(labels, whole[tensor])
            whole[tensor] = labels
            for axis in range(labels.dim()):
                if (tensor, axis) in first:
                    positions = first[tensor, axis]
                    shape = [-1 if d == axis else 1 for d in range(labels.dim())]
                    for row in positions if positions.dim() == 2 else (positions,):
                        self.atoms.tie(labels, row.reshape(shape))


Rule: TypeAlias = Callable[[Trace, Node, OpInfo], Traced]

_RULES: dict[type[Axes], Rule] = {
    Broadcast: elementwise.broadcast,
    Created: elementwise.created,
    Contracted: layers.contracted,
    Normalized: layers.normalized,
    Product: products.product,
    Moved: movement.moved,
    Indexed: indexing.indexed,
    Windowed: axes.windowed,
    Along: axes.along,
    Reduced: axes.reduced,
}
