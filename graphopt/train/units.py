"""The units of a model as slices of its parameters, for optimizers that train whole units to zero.

A unit of a dependency group (a channel, a head) is made by slices of several parameters: rows of the layers that make
it, scale and shift of the norms behind them. Where all of them are zero, so is the unit, as long as what follows maps
zero to zero: such slices are a *zero-invariant group* (Chen et al., Only Train Once, NeurIPS 2021, section 3.1). Here
they are found from the coupling of the model, and summed, scaled and zeroed by index tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.analysis.coupling import Coupling, Group, Member, couple
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["Block", "Span", "Units", "trainable_units"]


@dataclass(frozen=True)
class Span:
    """The numbers of one group's units: from `start` on, up to `stop`."""

    name: str
    family: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass
class Block:
    """A stored tensor and the units that its positions along one axis belong to.

    Attributes:
        unit: the number of each position's unit, -1 for none, in a shape that broadcasts to the tensor's: [1, size, 1]
            for the middle one of three axes, [n, size, 1] where the groups of a layer share the positions.
        places: [units of the span, most] where in `unit` each unit is, filled up with the number of places.
    """

    name: str
    tensor: Tensor
    span: Span
    unit: Tensor = field(repr=False)
    places: Tensor = field(repr=False)

    def sums(self, elements: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums of `elements`, which has the tensor's shape, over each unit of the span: [units of the span].

        Gathered and not scattered, so that a GPU adds in the same order every time.
        """
        axes = [axis for axis, size in enumerate(self.unit.shape) if size == 1 != elements.shape[axis]]
        by_place = elements.sum(axes, dtype=dtype).flatten() if axes else elements.to(dtype).flatten()
        self.places = self.places.to(elements.device)
        return torch.cat((by_place, by_place.new_zeros(1)))[self.places].sum(1)

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """Values [units of the model] laid out as `unit` is, on the tensor's device; `rest` where there is no unit."""
        self.unit = self.unit.to(self.tensor.device)
        return torch.cat((values, values.new_full((1,), rest))).to(self.tensor.device)[self.unit]  # -1 is the last


class Units:
    """Numbered units of some groups of a model, one family of each.

    It holds the tensors themselves: it sees them train, and follows them to another device. Tensors [units] are on the
    CPU.

    Args:
        coupling: of the model.
        groups: whose units, in the order in which they are numbered.
        families: for groups by name which family to take; the finest one where nothing is said.
        readers: whether the weights that read a unit belong to it, too.

    Raises:
        UsageError: when there is no such group or family.
    """

    def __init__(
        self,
        coupling: Coupling,
        groups: Iterable[Group],
        *,
        families: Mapping[str, int] | None = None,
        readers: bool = False,
    ) -> None:
        wanted = {coupling.group(name).name: family for name, family in (families or {}).items()}
        self.spans: list[Span] = []
        self.blocks: list[Block] = []
        self.count = 0
        for group in groups:
            span = _span(group, wanted.get(group.name), self.count)
            self.spans.append(span)
            self.blocks += _blocks(coupling, group, span, readers)
            self.count = span.stop
        wide = any(block.tensor.dtype == torch.float64 for block in self.blocks)
        self.dtype = torch.float64 if wide else torch.float32
        self.sizes = self.sums(torch.ones_like)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that have units, each once."""
        return list({id(block.tensor): block.tensor for block in self.blocks}.values())

    @torch.no_grad()
    def sums(self, of: Callable[[Tensor], Tensor | None]) -> Tensor:
        """[units] the sum of `of(tensor)`, shaped like the tensor, over the elements of each unit; None is nothing."""
        device = self.blocks[0].tensor.device if self.blocks else None
        total = torch.zeros(self.count, dtype=self.dtype, device=device)
        for block in self.blocks:
            elements = of(block.tensor)
            if elements is not None:
                total[block.span.start : block.span.stop] += block.sums(elements, self.dtype).to(device)
        return total.cpu()

    def norms(self) -> Tensor:
        """[units] Euclidean norms."""
        return self.sums(torch.square).sqrt()

    def dots(self, other: Callable[[Tensor], Tensor | None]) -> Tensor:
        """[units] inner products of the tensors with what `other` gives for each; None is zero."""
        return self.sums(lambda tensor: None if (found := other(tensor)) is None else tensor * found)

    def nonzeros(self) -> Tensor:
        """[units] how many elements are not zero."""
        return self.sums(lambda tensor: tensor != 0)

    def values(self, chosen: Tensor, value: float, rest: float) -> Tensor:
        """[units] a value for the units of a mask, and another for the rest."""
        return torch.full((self.count,), rest, dtype=self.dtype).masked_fill(chosen, value)

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply every unit by its factor [units]; zero makes zeros of anything."""
        for block in self._touched(factors != 1):
            spread = block.spread(factors.to(block.tensor.dtype), 1)
            block.tensor.mul_(spread).masked_fill_(spread == 0, 0)

    @torch.no_grad()
    def add(self, factors: Tensor, other: Callable[[Tensor], Tensor]) -> None:
        """Add to every unit its factor [units] times what `other` gives for the tensor, of the tensor's shape."""
        for block in self._touched(factors != 0):
            block.tensor.add_(block.spread(factors.to(block.tensor.dtype), 0) * other(block.tensor))

    @torch.no_grad()
    def zero(self, chosen: Tensor) -> None:
        """Set the units of a mask [units] to zero."""
        for block in self._touched(chosen):
            block.tensor.masked_fill_(block.spread(chosen, False), 0)

    def _touched(self, chosen: Tensor) -> Iterator[Block]:
        spans = {span.name for span in self.spans if bool(chosen[span.start : span.stop].any())}
        return (block for block in self.blocks if block.span.name in spans)


def trainable_units(
    model: Model,
    trained: Iterable[Tensor],
    *,
    only: Sequence[str] = (),
    leave: Sequence[str] = (),
    families: Mapping[str, int] | None = None,
    readers: bool = False,
) -> Units:
    """The units of the groups that training can make zero: all that makes them is among the `trained` tensors.

    Args:
        model: in either mode.
        trained: the parameters that an optimizer holds.
        only: names of groups to take; all by default.
        leave: names of groups to leave alone.
        families: as for `Units`.
        readers: as for `Units`.

    Raises:
        UsageError: for a name that no group has, a group in `only` that is not trained, and when nothing is left.
    """
    coupling = couple(model)
    left = {coupling.group(name).name for name in leave}
    wanted = [coupling.group(name) for name in dict.fromkeys(only)] or list(coupling.groups.values())
    known = {id(tensor) for tensor in trained}
    found = []
    for group in wanted:
        why = _obstacle(coupling, group, _span(group, (families or {}).get(group.name), 0), known)
        if why and only:
            raise UsageError(f"the units of '{group.name}' cannot become zero", why=why, todo="leave the group out")
        if not why and group.name not in left:
            found.append(group)
    if not found:
        raise UsageError("no group is left whose units could become zero", todo="see `graphopt groups`")
    return Units(coupling, found, families=families, readers=readers)


def _span(group: Group, family: int | None, start: int) -> Span:
    if family is None:
        family = max(range(len(group.families)), key=lambda index: len(group.families[index]))
    if not 0 <= family < len(group.families):
        raise UsageError(
            f"group '{group.name}' has no family {family}", todo=f"it has {len(group.families)}, from 0 on"
        )
    return Span(group.name, family, start, start + len(group.families[family]))


def _obstacle(coupling: Coupling, group: Group, span: Span, trained: Collection[int]) -> str | None:
    """Why training cannot make the units of a group zero; None if it can."""
    makers = [member for member in group.members if _makes(coupling, member)]
    for member in makers:
        if id(coupling.model.params[member.name]) not in trained:
            return f"'{member.name}' makes them, and is not trained"
    made = {unit for member in makers for unit in np.unique(member.unit[span.family]).tolist()}
    return None if made >= set(range(span.size)) else "some of them are made by no parameter"


def _makes(coupling: Coupling, member: Member) -> bool:
    """Whether a member makes its units: layers do, and the parameters that scale or shift them; statistics do not."""
    tensor = coupling.model.params[member.name]
    return member.slot.role == "out" or (member.slot.role == "scale" and isinstance(tensor, nn.Parameter))


def _blocks(coupling: Coupling, group: Group, span: Span, readers: bool) -> Iterator[Block]:
    seen: set[tuple[int, int]] = set()
    for member in group.members:
        tensor, unit = coupling.model.params[member.name], member.unit[span.family]
        key = (id(tensor), member.slot.axis)  # a tied tensor has one block
        belongs = _makes(coupling, member) or (readers and member.slot.role == "in")
        if belongs and key not in seen and (unit >= 0).any():
            seen.add(key)
            wide = _layout(unit, member.slot.axis, tensor)
            places = torch.from_numpy(_places(wide.ravel(), span.size))
            yield Block(member.name, tensor, span, torch.from_numpy(np.where(wide < 0, -1, wide + span.start)), places)


def _layout(unit: np.ndarray, axis: int, tensor: Tensor) -> np.ndarray:
    """Units [size], or [groups, size], in a shape that broadcasts to the tensor's."""
    shape = [1] * tensor.dim()
    shape[axis] = unit.shape[-1]
    if unit.ndim == 2:  # the other of the first two axes counts the groups
        shape[1 - axis] = tensor.shape[1 - axis]
        unit = np.repeat(unit, shape[1 - axis] // len(unit), axis=0)
        unit = unit.T if axis == 0 else unit
    return unit.reshape(shape)


def _places(unit: np.ndarray, count: int) -> np.ndarray:
    """[count, most] for each unit the places where it stands, filled up with the number of places."""
    order = np.argsort(unit, kind="stable")
    order = order[unit[order] >= 0]
    owners, many = unit[order], np.bincount(unit[order], minlength=count)
    places = np.full((count, many.max()), unit.size)
    places[owners, np.arange(order.size) - (np.cumsum(many) - many)[owners]] = order
    return places
