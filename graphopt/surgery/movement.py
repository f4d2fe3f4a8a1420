"""Data movement after a cut: numbers of positions are counted again, and what cannot be is selected instead.

A movement is run on the numbers of the places of its inputs, before and after the cut. The cut one has to bring the
same places to what is left of the output, in the same order: equal labels would not be enough.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.analysis.labels.movement import run_movement
from graphopt.analysis.removal import Conflict, Kept, Removal
from graphopt.ops import Indexed, Moved, argument
from graphopt.params import ParamKind
from graphopt.rewriter import Rewriter

__all__ = ["plan_movement", "refuse_free"]

aten = torch.ops.aten

_SIZES = {"view", "reshape", "_unsafe_view", "expand", "broadcast_to", "view_copy", "expand_copy"}
_SPLITS = {
    "split",
    "chunk",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
    "tensor_split",
}
_FOLLOWS = {"expand_as", "broadcast_tensors", "getitem"}
"""Movements into the shape of another operand: they need no change."""


def plan_movement(
    rw: Rewriter, removal: Removal, node: Node, axes: Moved | Indexed, why: str
) -> Callable[[], None] | None:
    """What to change about a movement so that it brings what is left to what is left; None: nothing.

    Raises:
        Conflict: when no change does.
    """
    return _Movement(rw, removal, node, axes, why).plan()


class _Movement:
    def __init__(self, rw: Rewriter, removal: Removal, node: Node, axes: Moved | Indexed, why: str) -> None:
        self.rw, self.removal, self.node, self.axes, self.why = rw, removal, node, axes, why
        self.trace = removal.coupling.trace
        self.name = str(node.target).removeprefix("aten.").partition(".")[0]

    def plan(self) -> Callable[[], None] | None:
        if self.node.target is not None and not isinstance(self.node.target, torch._ops.OpOverload):
            return None  # picks one of several outputs
        if self.name in _FOLLOWS:
            return None
        given = self._operands()
        before = self._numbered(given)
        whole = run_movement(self.node, before, self.trace.number, self._known, fill=-1)
        made = self.removal.each(self.node)
        wanted = [_box(one, kept) for one, kept in zip(_listed(whole), made, strict=True)]
        left = {used: _box(numbers, self.removal.of(used)) for used, numbers in before.items()}
        for changes in self._changes(made):
            if self._brings(left, changes, wanted):
                return partial(self._update, changes) if changes else None
        if self.name in _SPLITS:
            return self._split(made, left, wanted)
        selected = self._selection(given, left, wanted)
        if selected is None:
            raise Conflict(
                "the movement cannot be made for what is left", where=f"'{self.node.name}'", todo="remove other units"
            )
        return selected

    def _operands(self) -> list[Node]:
        names = self.axes.values if isinstance(self.axes, Moved) else (self.axes.table,)
        found = pytree.tree_leaves([argument(self.node, name) for name in names])
        return list(dict.fromkeys(used for used in found if isinstance(used, Node)))

    def _numbered(self, given: list[Node]) -> dict[Node, torch.Tensor]:
        """The places of all inputs, each with a number of its own."""
        found, count = {}, 0
        for used in given:
            sizes = self.trace.sizes(used)
            number = torch.Size(sizes).numel()
            found[used] = torch.arange(count, count + number).reshape(sizes)
            count += number
        return found

    def _known(self, used: Node) -> torch.Tensor:
        value = self.trace.value(used)
        return value if value is not None else torch.zeros(self.trace.sizes(used), dtype=torch.int64)

    def _brings(self, left: dict[Node, torch.Tensor], changes: dict[str, Any], wanted: list[torch.Tensor]) -> bool:
        try:
            made = run_movement(self.node, left, self.trace.number, self._known, fill=-1, changes=changes)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        return all(torch.equal(a, b) for a, b in zip(_listed(made), wanted, strict=True)) and len(_listed(made)) == len(
            wanted
        )

    # Numbers in the call

    def _changes(self, made: list[Kept]) -> Iterator[dict[str, Any]]:
        """Arguments worth a try: as they are, then counted again."""
        yield {}
        if self.name in _SIZES:
            name = "shape" if self.name == "reshape" else "size"
            sizes = list(argument(self.node, name))
            yield {name: self._counted(sizes, made[0][len(made[0]) - len(sizes) :])}
        elif self.name == "unflatten":
            sizes, first = list(argument(self.node, "sizes")), self._axis()
            yield {"sizes": self._counted(sizes, made[0][first : first + len(sizes)])}
        elif self.name in ("slice", "narrow", "select"):
            yield from self._bounds()

    def _counted(self, sizes: list[Any], kept: Kept) -> list[Any]:
        return [
            size if left is None or (isinstance(size, int) and size == -1) else left.numel()
            for size, left in zip(sizes, kept, strict=True)
        ]

    def _update(self, changes: dict[str, Any]) -> None:
        """Write the new arguments into the call; a size that was computed is still computed."""
        for name, new in changes.items():
            if isinstance(new, list):
                old = argument(self.node, name)
                changes[name] = [self._size(a, b) for a, b in zip(old, new, strict=True)]
        self.rw.update(self.node, self.why, **changes)

    def _size(self, old: Any, new: Any) -> Any:
        """A size that was `old` and is `new` at the size of the example; free sizes in it stay free."""
        if not isinstance(old, Node) or isinstance(new, Node):
            return new
        step = math.gcd(new, self.trace.number(old))
        times = self.rw.call(operator.mul, old, new // step, before=self.node)
        return self.rw.call(operator.floordiv, times, self.trace.number(old) // step, before=self.node)

    def _axis(self) -> int:
        return int(argument(self.node, "dim")) % len(self.trace.sizes(argument(self.node, "self")))

    def _bounds(self) -> Iterator[dict[str, Any]]:
        """Where a slice begins and ends, in positions that are left."""
        axis = self._axis()
        size, kept = (
            self.trace.sizes(argument(self.node, "self"))[axis],
            self.removal.of(argument(self.node, "self"))[axis],
        )
        if kept is None:
            return
        names = {"slice": ("start", "end"), "narrow": ("start", "length"), "select": ("index",)}[self.name]
        numbers = [argument(self.node, name, None) for name in names]
        if any(not isinstance(number, int | None) for number in numbers):
            return
        if self.name == "select":
            yield {"index": self._before(kept, numbers[0], size)}
            return
        start = self._before(kept, numbers[0] or 0, size)
        if self.name == "narrow":
            yield {"start": start, "length": self._before(kept, numbers[0] + numbers[1], size) - start}
        else:
            yield {"start": start, "end": self._before(kept, size if numbers[1] is None else numbers[1], size)}

    @staticmethod
    def _before(kept: torch.Tensor, position: int, size: int) -> int:
        """How many positions are left before one."""
        place = position + size if position < 0 else min(position, size)
        return int((kept < place).sum())

    # Other operators in its place

    def _split(
        self, made: list[Kept], left: dict[Node, torch.Tensor], wanted: list[torch.Tensor]
    ) -> Callable[[], None] | None:
        """Split by counted sizes, whatever the call has split by."""
        source, axis = argument(self.node, "self"), self._axis()
        refuse_free(source, axis)
        sizes = [one.shape[axis] for one in wanted]
        parts = torch.split_with_sizes(left[source], sizes, axis)
        if not all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=True)):
            raise Conflict("its parts would mix", where=f"'{self.node.name}'", todo="remove other units")

        def step() -> None:
            new = self.rw.call(aten.split_with_sizes.default, source, sizes, axis, before=self.node)
            self.rw.replace(self.node, new, self.why)

        return step

    def _selection(
        self, given: list[Node], left: dict[Node, torch.Tensor], wanted: list[torch.Tensor]
    ) -> Callable[[], None] | None:
        """Select positions along one axis of the only operand."""
        if len(given) != 1 or len(wanted) != 1 or left[given[0]].dim() != wanted[0].dim():
            return None
        source, target = left[given[0]], wanted[0]
        if torch.equal(source, target):
            return lambda: self.rw.replace(self.node, given[0], self.why)
        for axis in range(source.dim()):
            places = _places(source, target, axis)
            if places is not None:
                refuse_free(given[0], axis)

                def step(axis: int = axis, places: torch.Tensor = places) -> None:
                    index = self.rw.add_tensor(
                        f"{self.node.name}_positions", places, kind=ParamKind.CONSTANT, like=self.node
                    )
                    new = self.rw.call(aten.index_select.default, given[0], axis, index, before=self.node)
                    self.rw.replace(self.node, new, self.why)

                return step
        return None


def refuse_free(node: Node, axis: int) -> None:
    """Numbers of positions mean nothing along an axis whose size is free.

    Raises:
        Conflict: when it is.
    """
    if not isinstance(node.meta["val"].shape[axis], int):
        raise Conflict("positions would be selected along an axis whose size is free", where=f"'{node.name}'")


def _places(source: torch.Tensor, target: torch.Tensor, axis: int) -> torch.Tensor | None:
    """For each position of `target` along the axis the equal one of `source`; None where there is none."""
    others = [d for d in range(source.dim()) if d != axis]
    if [source.shape[d] for d in others] != [target.shape[d] for d in others]:
        return None
    source, target = source.cpu(), target.cpu()
    has = {source.select(axis, i).contiguous().numpy().tobytes(): i for i in range(source.shape[axis])}
    found = [has.get(target.select(axis, i).contiguous().numpy().tobytes()) for i in range(target.shape[axis])]
    return None if any(place is None for place in found) else torch.tensor(found)


def _listed(made: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return made if isinstance(made, list) else [made]


def _box(numbers: torch.Tensor, kept: Kept) -> torch.Tensor:
    for axis, positions in enumerate(kept):
        if positions is not None:
            numbers = numbers.index_select(axis, positions)
    return numbers
