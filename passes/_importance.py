"""What a unit of a group is worth: one small class for each answer.

Every measure gives one number for each unit of a family. Those of one group can be compared; `comparable` says whether
those of several can, too. Where they cannot, each is taken as its share of the group's sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.analysis.coupling import Coupling, Group, Member
from graphopt.analysis.labels import Slot
from graphopt.analysis.observe import observe
from graphopt.ops import Contracted, argument, lookup, operands
from graphopt.rewriter import Node

__all__ = ["MEASURES", "Importance", "Measured", "measure", "read_by", "reads"]

Batches = Sequence[Sequence[Tensor]]


class Importance(ABC):
    """A measure of units."""

    comparable = False
    needs_data = False

    def __init__(self, coupling: Coupling, batches: Batches, seed: int) -> None:
        self.coupling, self.batches, self.seed = coupling, batches, seed

    @abstractmethod
    def scores(self, group: Group, family: int) -> np.ndarray:
        """[units] how much is lost with each."""

    def tensor(self, member: Member) -> Tensor:
        return self.coupling.model.params[member.name].detach().cpu().double()

    def summed(self, group: Group, family: int, values: Callable[[Member], Tensor | None]) -> np.ndarray:
        """For each unit the sum over all its positions of `values`, which has the shape of the member's labels."""
        total = np.zeros(len(group.families[family]))
        for member in group.members:
            found = values(member)
            units = member.unit[family]
            if found is not None and (units >= 0).any():
                total += np.bincount(units[units >= 0], found.numpy()[units >= 0], minlength=total.size)
        return total


def by_position(member: Member, elements: Tensor) -> Tensor:
    """Sums of a tensor's elements over all axes but that of the member: [size], or [groups, size] where the groups of
    a layer share positions of its weight."""
    axis, labels = member.slot.axis, member.slot.labels
    if labels.dim() == 1:
        return elements.movedim(axis, 0).reshape(elements.shape[axis], -1).sum(1)
    groups, size = labels.shape  # the other of the first two axes counts the groups
    return elements.movedim(axis, 1).reshape(groups, elements.shape[1 - axis] // groups, size, -1).sum((1, 3))


class Magnitude(Importance):
    """Sum of squares of all weights that go with a unit (Li et al., Pruning Filters for Efficient ConvNets, 2017, with
    the whole group as in Fang et al., DepGraph, 2023)."""

    power = 2

    def scores(self, group: Group, family: int) -> np.ndarray:
        return self.summed(group, family, self._norm)

    def _norm(self, member: Member) -> Tensor | None:
        tensor = self.tensor(member)
        return by_position(member, tensor.abs() ** self.power) if tensor.dim() > 1 else None


class Absolute(Magnitude):
    """The same with absolute values."""

    power = 1


class NormScale(Magnitude):
    """Absolute scale of the batch norm behind a unit (Liu et al., Network Slimming, 2017); where a group has none, its
    magnitude."""

    def scores(self, group: Group, family: int) -> np.ndarray:
        scales = [member for member in group.members if self._is_scale(member)]
        if not scales:
            return super().scores(group, family)
        return self.summed(group, family, lambda member: self.tensor(member).abs() if member in scales else None)

    @staticmethod
    def _is_scale(member: Member) -> bool:
        user = member.slot.user
        return str(user.target) == "aten.batch_norm.default" and argument(user, "weight") is member.slot.tensor


class Median(Importance):
    """Sum of distances to the other units' filters: one close to all others can be stood in for (He et al., Filter
    Pruning via Geometric Median, 2019)."""

    def scores(self, group: Group, family: int) -> np.ndarray:
        total = np.zeros(len(group.families[family]))
        for member in group.members:
            tensor = self.tensor(member)
            if member.slot.role == "out" and tensor.dim() > 1 and member.slot.labels.dim() == 1:
                rows = tensor.movedim(member.slot.axis, 0).flatten(1)
                distances = torch.cdist(rows, rows).sum(1).numpy()
                units = member.unit[family]
                total += np.bincount(units[units >= 0], distances[units >= 0], minlength=total.size)
        return total


class Random(Importance):
    """Chance: what everything else has to beat."""

    def scores(self, group: Group, family: int) -> np.ndarray:
        name = sum(ord(letter) * 31**place for place, letter in enumerate(group.name[-8:]))
        return np.random.default_rng([self.seed, family, name]).random(len(group.families[family]))


class Activation(Importance):
    """Weights times the size of what they read, squared and summed (Sun et al., Wanda, 2024, for whole units)."""

    needs_data = True

    def __init__(self, coupling: Coupling, batches: Batches, seed: int) -> None:
        super().__init__(coupling, batches, seed)
        self._squares: dict[Node, Tensor] = {}
        sources = {source: axis for group in coupling.groups.values() for source, axis in _sources(group)}
        observe(coupling.model, batches, {s: self._adder(s, axis) for s, axis in sources.items()})

    def _adder(self, source: Node, axis: int) -> Callable[[Tensor], None]:
        def add(value: Tensor) -> None:
            squares = value.double().movedim(axis, 0).flatten(1).square().mean(1).cpu()
            self._squares[source] = self._squares.get(source, torch.zeros(())) + squares

        return add

    def scores(self, group: Group, family: int) -> np.ndarray:
        return self.summed(group, family, self._read)

    def _read(self, member: Member) -> Tensor | None:
        found = read_by(member.slot)
        if found is None:
            return None
        weights = by_position(member, self.tensor(member).square())
        return weights * self._squares[found[0]].reshape(weights.shape)


class Taylor(Importance):
    """Expected square of what the outputs change by when nobody reads the unit, to first order, relative to the
    outputs: the sum over the readers' weights of w * gradient, for random directions of the outputs (Molchanov et al.,
    Importance Estimation for Neural Network Pruning, 2019, with the outputs' own size as the loss)."""

    needs_data = True
    comparable = True
    directions = 16

    def __init__(self, coupling: Coupling, batches: Batches, seed: int) -> None:
        super().__init__(coupling, batches, seed)
        members = [member for group in coupling.groups.values() for member in group.members]
        self._sums = [
            {id(m): by_position(m, products[m.name]).cpu() for m in members if m.name in products}
            for products in self._products()
        ]

    def _products(self) -> Iterator[dict[str, Tensor]]:
        """For every batch and direction, weight times gradient of every parameter."""
        copy = self.coupling.model.clone()
        named = {name: p for name, p in copy.params.items() if isinstance(p, nn.Parameter) and p.is_floating_point()}
        for parameter in named.values():
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(self.seed)
        for batch in self.batches:
            outputs = [y for y in copy.call_flat(batch) if y.is_floating_point() and y.requires_grad]
            size = sum(float(y.detach().double().square().sum()) for y in outputs)
            for _ in range(self.directions):
                signs = [torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1 for y in outputs]
                scaled = [sign / max(size, 1e-30) ** 0.5 for sign in signs]
                found = torch.autograd.grad(outputs, list(named.values()), scaled, allow_unused=True, retain_graph=True)
                pairs = zip(named.items(), found, strict=True)
                yield {name: (p.detach() * g).double() for (name, p), g in pairs if g is not None}

    def scores(self, group: Group, family: int) -> np.ndarray:
        return np.asarray((self.changes(group, family) ** 2).sum(0) / max(len(self._sums), 1))

    def changes(self, group: Group, family: int) -> np.ndarray:
        """[batches * directions, units] how the outputs change along each direction without each unit."""
        role = "in" if any(member.slot.role == "in" for member in group.members) else "out"
        found = np.zeros((len(self._sums), len(group.families[family])))
        for place, sums in enumerate(self._sums):

            def read(member: Member, sums: dict[int, Tensor] = sums) -> Tensor | None:
                return sums.get(id(member)) if member.slot.role == role else None

            found[place] = self.summed(group, family, read)
        return found


class Fisher(Taylor):
    """As `taylor`, but for what goes together: the expected square of the sum of what all units that go change, with
    their interactions, added up as units are taken off one by one, each time the one that adds least (the Fisher
    matrix as in Benbaki et al., Fast as CHITA, ICML 2023, of whole units and without moving weights)."""

    def scores(self, group: Group, family: int) -> np.ndarray:
        changes = self.changes(group, family)  # [samples, units]
        alone = (changes**2).sum(0)
        together = changes.T @ changes
        scores, left = np.zeros(len(alone)), np.ones(len(alone), dtype=bool)
        with_gone, worst = np.zeros(len(alone)), 0.0
        for _ in range(len(alone)):
            added = np.where(left, alone + 2 * with_gone, np.inf)
            unit = int(added.argmin())
            worst = max(worst, float(added[unit]), 0.0)  # units stay in this order when they are sorted
            scores[unit], left[unit] = worst, False
            with_gone += together[unit]
        return scores / max(len(changes), 1)


class Reconstruction(Activation):
    """What is lost of a reader's output by a unit that the others stand in for as well as they can: its variance given
    the others, times the squares of the weights that read it (the surgeon's formula 1 / (C^-1)_ii: Hassibi and Stork,
    Second Order Derivatives for Network Pruning, 1992, for inputs as in He et al., Channel Pruning, 2017)."""

    def _adder(self, source: Node, axis: int) -> Callable[[Tensor], None]:
        def add(value: Tensor) -> None:
            rows = value.movedim(axis, -1).flatten(0, -2).double()
            self._squares[source] = self._squares.get(source, torch.zeros(())) + (rows.T @ rows / len(rows)).cpu()

        return add

    def _read(self, member: Member) -> Tensor | None:
        found = read_by(member.slot)
        if found is None:
            return None
        weights = by_position(member, self.tensor(member).square())
        moments = self._squares[found[0]]
        ridge = _RIDGE * moments.diagonal().mean().clamp(min=1e-30) * torch.eye(len(moments))
        variances: Tensor = 1 / torch.linalg.inv(moments + ridge).diagonal()
        return weights * variances.reshape(weights.shape)


_RIDGE = 1e-6
"""In units of the mean square: keeps the moments of inputs that depend on each other from having no inverse."""


def read_by(slot: Slot) -> tuple[Node, int] | None:
    """What the weight of a slot reads, and the axis of that which it reads along; None when it reads nothing."""
    return reads(slot.user) if slot.role == "in" else None


def reads(layer: Node) -> tuple[Node, int] | None:
    """What a layer with a stored weight reads, and along which axis; None for anything else."""
    info = lookup(layer.target)
    if info is not None and isinstance(info.axes, Contracted):
        return argument(layer, info.axes.input), info.axes.input_axis
    if str(layer.target) not in _LAST or operands(layer)[0].op == "get_attr":
        return None
    return operands(layer)[0], -1


_LAST = frozenset({"aten.matmul.default", "aten.addmm.default", "aten.mm.default"})
"""Products that read the last axis of their first operand."""


def _sources(group: Group) -> Iterator[tuple[Node, int]]:
    for member in group.members:
        found = read_by(member.slot)
        if found is not None:
            yield found


Measured = Literal[
    "taylor", "fisher", "activation", "reconstruction", "magnitude", "l1", "bn-scale", "median", "random"
]

MEASURES: dict[str, type[Importance]] = {
    "taylor": Taylor,
    "fisher": Fisher,
    "activation": Activation,
    "reconstruction": Reconstruction,
    "magnitude": Magnitude,
    "l1": Absolute,
    "bn-scale": NormScale,
    "median": Median,
    "random": Random,
}


def measure(name: str, coupling: Coupling, batches: Batches, seed: int) -> Importance:
    """The measure called `name`, ready to be asked."""
    return MEASURES[name](coupling, batches, seed)
