"""The cut: all of it is planned, and can be refused, before anything is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.analysis.labels import Slot
from graphopt.analysis.removal import Conflict, Kept, Removal
from graphopt.fake import ShapeError
from graphopt.ops import Broadcast, Contracted, Moved, Normalized, Product, argument, lookup, tensor_arguments
from graphopt.ops.axes import Indexed
from graphopt.params import ParamKind
from graphopt.rewriter import Rewriter
from graphopt.surgery.movement import plan_movement, refuse_free

__all__ = ["cut"]

Step = Callable[[], None]


def cut(rw: Rewriter, removal: Removal, why: str) -> None:
    """Remove classes from the model that `rw` holds, which has to be the one that the coupling is of.

    Every parameter, buffer and mask loses the positions, and so does every literal that counts them.

    Raises:
        Conflict: when that cannot be done; nothing is edited then.
    """
    _Cut(rw, removal, why).run()


class _Cut:
    def __init__(self, rw: Rewriter, removal: Removal, why: str) -> None:
        self.rw, self.removal, self.why = rw, removal, why
        self.trace = removal.coupling.trace

    def run(self) -> None:
        weights = [self._weight(*item) for item in self._weights().items()]
        calls = [node for node in self.rw.graph.nodes if node.op == "call_function"]
        steps = [(node, self._plan(node)) for node in calls]
        for weight in weights:
            weight()
        for node, step in steps:
            try:
                if step is not None:
                    step()
                if not node._erased:
                    self.rw.refresh(node)
            except ShapeError as error:
                raise Conflict(
                    f"the operator does not take what is left: {error.what}", where=f"'{node.name}'"
                ) from error

    # Stored tensors

    def _weights(self) -> dict[int, tuple[list[Node], dict[int, torch.Tensor]]]:
        """For each stored tensor the nodes that read it, and the positions that stay along its axes."""
        found: dict[int, tuple[list[Node], dict[int, torch.Tensor]]] = {}
        readers: dict[int, list[Node]] = {}
        for node in self.rw.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(id(self.rw.params[str(node.target)]), []).append(node)
        for node, axis, positions in self._axes():
            key = id(self.rw.params[str(node.target)])
            found.setdefault(key, (readers[key], {}))[1][axis] = positions
        return found

    def _axes(self) -> Iterator[tuple[Node, int, torch.Tensor]]:
        for slot in self.trace.slots:
            positions = self._of_slot(slot)
            if positions is not None:
                yield slot.tensor, slot.axis, positions
        for node in self.rw.graph.nodes:
            if node.op == "get_attr" and self.trace.labels.get(node) is not None:
                for axis, positions in enumerate(self.removal.of(node)):
                    if positions is not None:
                        yield node, axis, positions

    def _of_slot(self, slot: Slot) -> torch.Tensor | None:
        return self.removal.kept(slot.labels, slot.user)[-1]

    def _weight(self, _: int, item: tuple[list[Node], dict[int, torch.Tensor]]) -> Step:
        nodes, axes = item

        def step() -> None:
            tensor = _selected(self.rw.params[str(nodes[0].target)].detach(), axes)
            for name in self.rw.params.aliases(str(nodes[0].target)) & self.rw.params.masks.keys():
                self.rw.params.masks[name] = _selected(self.rw.params.masks[name], axes)
            for node in nodes:
                self.rw.set_tensor(node, tensor, self.why)

        return step

    # Calls

    def _plan(self, node: Node) -> Step | None:
        """What to do with a call besides inferring its shape again; None: nothing."""
        info = lookup(node.target)
        made = self.removal.each(node)
        touched = any(positions is not None for kept in (*made, *self._inputs(node)) for positions in kept)
        if info is None or not touched:
            return None
        if isinstance(info.axes, Broadcast):
            return self._operands(node, info.axes, made[0])
        if isinstance(info.axes, Moved | Indexed) and str(node.target) != "aten.embedding.default":
            return plan_movement(self.rw, self.removal, node, info.axes, self.why)
        if isinstance(info.axes, Contracted) and info.axes.groups:
            return self._groups(node, info.axes)
        if isinstance(info.axes, Normalized):
            return self._norm(node, info.axes)
        if isinstance(info.axes, Product) and str(node.target) == "aten.scaled_dot_product_attention.default":
            return self._scale(node)
        return None

    def _inputs(self, node: Node) -> list[Kept]:
        return [kept for used in node.all_input_nodes if used.op != "get_attr" for kept in self.removal.each(used)]

    def _operands(self, node: Node, axes: Broadcast, result: Kept) -> Step | None:
        """Select in operands that still have what the result has lost."""
        changes: dict[Node, list[tuple[int, torch.Tensor]]] = {}
        names = axes.operands or tuple(tensor_arguments(node))
        for used in pytree.tree_leaves([argument(node, name) for name in names]):
            if isinstance(used, Node):
                selections = list(self._missing(used, result))
                if selections:
                    changes[used] = selections
        if not changes:
            return None

        def step() -> None:
            for used, selections in changes.items():
                self.rw.replace_input(node, used, self._select(node, used, selections), self.why)

        return step

    def _missing(self, used: Node, result: Kept) -> Iterator[tuple[int, torch.Tensor]]:
        """The axes of an operand on which positions have to be selected, and which of those that it has."""
        sizes, kept = self.trace.sizes(used), self.removal.of(used)
        for axis, size in enumerate(sizes):
            wanted = result[axis + len(result) - len(sizes)]
            if size == 1 or wanted is None:
                continue
            has = torch.arange(size) if (own := kept[axis]) is None else own
            if not torch.equal(has, wanted):
                refuse_free(used, axis)
                yield axis, torch.searchsorted(has, wanted)

    def _select(self, node: Node, used: Node, selections: list[tuple[int, torch.Tensor]]) -> Node:
        constant = used.op == "get_attr" and self.rw.params.kind(str(used.target)) is not ParamKind.PARAMETER
        if constant:
            tensor = _selected(self.rw.params[str(used.target)].detach(), dict(selections))
            return self.rw.add_tensor(f"{used.target}_cut", tensor, kind=ParamKind.CONSTANT, like=used)
        for axis, positions in selections:
            index = self.rw.add_tensor(f"{node.name}_positions", positions, kind=ParamKind.CONSTANT, like=node)
            used = self.rw.call(torch.ops.aten.index_select.default, used, axis, index, before=node)
        return used

    def _groups(self, node: Node, axes: Contracted) -> Step | None:
        groups = self.trace.number(argument(node, "groups"))
        source = argument(node, axes.input)
        positions = self.removal.of(source)[axes.input_axis % len(self.trace.sizes(source))]
        if groups == 1 or positions is None:
            return None
        each = self.trace.sizes(source)[axes.input_axis % len(self.trace.sizes(source))] // groups
        left = torch.unique(positions // each).numel()
        return None if left == groups else lambda: self.rw.update(node, self.why, groups=left)

    def _norm(self, node: Node, axes: Normalized) -> Step | None:
        kept, sizes = self.removal.of(node), self.trace.sizes(node)
        if axes.over == "trailing":
            shape = list(argument(node, "normalized_shape"))
            first = len(sizes) - len(shape)
            new = [size if (left := kept[first + i]) is None else left.numel() for i, size in enumerate(shape)]
            return None if new == shape else lambda: self.rw.update(node, self.why, normalized_shape=new)
        positions = kept[1]
        if axes.over != "group" or positions is None:
            return None
        groups = self.trace.number(argument(node, "num_groups"))
        left = torch.unique(positions // (sizes[1] // groups)).numel()
        return None if left == groups else lambda: self.rw.update(node, self.why, num_groups=left)

    def _scale(self, node: Node) -> Step | None:
        """The scale follows from the number of features, and has to stay what it was."""
        query = argument(node, "query")
        if self.removal.of(query)[-1] is None or argument(node, "scale", None) is not None:
            return None
        scale = self.trace.sizes(query)[-1] ** -0.5
        return lambda: self.rw.update(node, self.why, scale=scale)


def _selected(tensor: torch.Tensor, axes: dict[int, torch.Tensor]) -> torch.Tensor:
    for axis, positions in axes.items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor.clone()
