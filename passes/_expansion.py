"""Expansion: copies of a unit are put behind it, everywhere, and nobody hears of them yet.

The inverse of a cut. A cut selects the positions that stay; an expansion selects some of them several times, so that
the same code counts every literal again. Afterwards the weights that read new positions are zero, so that these add
nothing to any sum; those that make them may be anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from graphopt.analysis.coupling import Coupling, couple
from graphopt.analysis.labels import Labels, compact, varies
from graphopt.analysis.removal import Conflict, Kept, Removal
from graphopt.params import ParamKind
from graphopt.rewriter import Node, Rewriter
from graphopt.surgery import cut

__all__ = ["Draw", "Growth", "Init", "Silence", "expand", "fresh"]

Init: TypeAlias = Literal["normal", "copy"]

Silence: TypeAlias = dict[tuple[str, int], Tensor]
"""Name of a stored tensor and an axis of it -> [size] bool, positions along it whose copies have to be zero."""


class Growth(Removal):
    """Copies of one unit of a coupling: `times` of them stand behind each run of its positions.

    What `kept` returns are positions of the tensor as it was, those of the unit several times.
    """

    def __init__(self, coupling: Coupling, unit: Iterable[int], times: int) -> None:
        super().__init__(coupling, unit)
        self.times = times

    def places(self, labels: Labels) -> Tensor:
        """Which elements of a tensor of labels are the unit's (bool, axes on which nothing changes of size one)."""
        return torch.from_numpy(np.asarray(self._gone[compact(self.coupling.of(labels)).numpy()]))

    def _kept(self, labels: Labels, node: Node) -> Kept:
        mine = self.places(labels)
        if not bool(mine.any()):
            return (None,) * labels.dim()
        classes = compact(self.coupling.of(labels))
        others = (classes != 0) & ~mine
        grown: list[Tensor | None] = []
        left = mine.clone()
        for axis in range(labels.dim()):
            rows = _along(mine, axis) & ~_along(others, axis)
            if varies(classes, (axis,)) and bool(rows.any()):
                grown.append(self._repeated(rows))
                left &= ~rows.reshape([-1 if d == axis else 1 for d in range(labels.dim())])
            else:
                grown.append(None)
        if bool(left.any()):
            raise Conflict("what would be copied is not some positions of one axis", where=f"'{node.name}'")
        return tuple(grown)

    def _repeated(self, rows: Tensor) -> Tensor:
        """All positions in order, each run of marked ones `times` more behind it."""
        found: list[int] = []
        run: list[int] = []
        for position, marked in enumerate(rows.tolist()):
            if not marked:
                found += run * self.times
                run = []
            else:
                run.append(position)
            found.append(position)
        return torch.tensor(found + run * self.times)


def _along(mask: Tensor, axis: int) -> Tensor:
    return mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1)


def fresh(positions: Tensor) -> Tensor:
    """Which of the positions of a growth are copies (bool): all but the first of each."""
    first = torch.full((int(positions.max()) + 1,), len(positions))
    first.scatter_reduce_(0, positions, torch.arange(len(positions)), "amin")
    return torch.arange(len(positions)) != first[positions]


@dataclass
class Draw:
    """Values of weights that make new positions: normal with the deviation of those that exist, or copies.

    Every call draws on, so that no two tensors get the same values.
    """

    init: Init
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def like(self, tensor: Tensor, existing: Tensor) -> Tensor:
        if self.init == "copy" or existing.numel() < 2:
            return tensor
        drawn = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
        return (drawn * float(existing.double().std())).to(tensor.device, tensor.dtype)


@dataclass
class _Axes:
    """What happens along the axes of one stored tensor: copies that are drawn anew, and copies that are zero."""

    node: Node
    drawn: dict[int, Tensor] = field(default_factory=dict)
    zero: dict[int, Tensor] = field(default_factory=dict)


def expand(rw: Rewriter, growth: Growth, silence: Silence, draw: Draw, why: str) -> None:
    """Carry a growth out, with zeros in all weights that read what is new and in those of `silence`.

    Raises:
        Conflict: when it cannot be done; nothing is edited then.
    """
    plans = _plans(rw, growth, silence)
    for (name, axis), unheard in _unheard(growth).items():
        plan = plans[_known(rw, plans, name)]
        plan.zero[axis] = unheard | plan.zero.get(axis, torch.zeros_like(unheard))
    before = {name: rw.params[name].detach() for name in plans}
    cut(rw, growth, why)
    for name, plan in plans.items():
        if plan.drawn or plan.zero:
            rw.set_tensor(plan.node, _values(rw, plan, before[name], draw), why)
    rw.model.touch()


def _known(rw: Rewriter, plans: dict[str, _Axes], name: str) -> str:
    """The name under which there is a plan for a tensor."""
    return next(alias for alias in plans if alias in rw.params.aliases(name))


def _plans(rw: Rewriter, growth: Growth, silence: Silence) -> dict[str, _Axes]:
    plans: dict[str, _Axes] = {}
    known: dict[int, str] = {}
    roles: dict[tuple[str, int], str] = {}
    for node, axis, positions, role in _grown(growth):
        name = known.setdefault(id(rw.params[str(node.target)]), str(node.target))
        if roles.setdefault((name, axis), role) != role:
            raise Conflict(
                f"'{name}' makes the positions in one place and reads them in another, so that copies would have to be "
                "zero for the one and not for the other",
                where=f"'{node.name}'",
            )
        plan = plans.setdefault(name, _Axes(node))
        if role == "out" and rw.params.kind(name) is ParamKind.PARAMETER:
            plan.drawn[axis] = fresh(positions)
        quiet = silence.get((str(node.target), axis))
        if quiet is not None:
            plan.zero[axis] = fresh(positions) & quiet[positions]
    return plans


def _unheard(growth: Growth) -> dict[tuple[str, int], Tensor]:
    """By names of stored tensors and axes that are read: which positions are new, bool of the size to come.

    Which these are depends on the way from the layer that makes them: a copy behind its original is in front of it
    after a flip. So a copy of the model grows, and its own labels tell.

    Raises:
        Conflict: when some weight would not find all originals and all copies.
    """
    model = growth.coupling.model
    copy = model.clone(share_tensors=True)
    cut(Rewriter(copy), Growth(growth.coupling.onto(copy), growth.classes, growth.times), "")
    copy.touch()
    after = couple(copy)
    named = {node.name: labels for node, labels in after.trace.origins.items()}
    new: set[int] = set()
    for node, labels in growth.coupling.trace.origins.items():
        positions = growth.kept(labels.reshape(-1), node)[0]
        if positions is not None:
            new.update(after.of(named[node.name].reshape(-1))[fresh(positions)].tolist())
    found: dict[tuple[str, int], Tensor] = {}
    for slot in after.trace.slots:
        unheard = torch.isin(after.of(slot.labels), torch.tensor(sorted(new)))
        if slot.role == "in" and bool(unheard.any()):
            name = str(slot.tensor.target)
            if min(new) < 1 or int((~unheard).sum()) != model.params[name].shape[slot.axis]:
                raise Conflict("copies mix with originals on the way there", where=f"'{slot.user.name}'")
            found[name, slot.axis] = unheard
    for node, axis, _, role in _grown(growth):
        if role == "in" and (str(node.target), axis) not in found:
            raise Conflict(f"copies do not arrive at '{node.target}'", where=f"'{node.name}'")
    return found


def _grown(growth: Growth) -> Iterator[tuple[Node, int, Tensor, str]]:
    """Axes of stored tensors along which copies are made."""
    trace = growth.coupling.trace
    for slot in trace.slots:
        positions = growth.kept(slot.labels, slot.user)[-1]
        if positions is not None:
            yield slot.tensor, slot.axis, positions, slot.role
    seen = {(slot.tensor, slot.axis) for slot in trace.slots}
    for node in growth.coupling.model.graph.nodes:
        if node.op == "get_attr" and trace.labels.get(node) is not None:
            for axis, positions in enumerate(growth.of(node)):
                if positions is not None and (node, axis) not in seen:
                    yield node, axis, positions, "scale"


def _values(rw: Rewriter, plan: _Axes, before: Tensor, draw: Draw) -> Tensor:
    name = str(plan.node.target)
    tensor = rw.params[name].detach().clone()
    if plan.drawn:
        drawn = draw.like(tensor, before)
        for axis, copies in plan.drawn.items():
            where = copies.nonzero().flatten().to(tensor.device)
            tensor.index_copy_(axis, where, drawn.index_select(axis, where))
    for axis, copies in plan.zero.items():
        tensor.index_fill_(axis, copies.nonzero().flatten().to(tensor.device), 0)
    for alias in rw.params.aliases(name) & rw.params.masks.keys():
        tensor[rw.params.masks[alias].to(tensor.device)] = 0
    return tensor
