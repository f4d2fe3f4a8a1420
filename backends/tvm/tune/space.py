"""The choices that a kernel has for a function, and how a search moves among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tvm import ir

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices
from graphopt.backends.tvm.kernels.fused import Fused, read_chain, read_fused
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.rows import Rows, divisions
from graphopt.backends.tvm.tune.tasks import Task

__all__ = ["Space"]

_MOST_WIDE, _FEWEST_SUMS = 6, 6
"""Vectors of a tile at most, and accumulators at least: fewer wait for one another."""

_STEPS = (1, 2, 4, 8)
_LEFT_TO_RULES = 0.4
"""How often a random choice leaves a parameter to the rule: rules are right more often than chance."""


@dataclass(frozen=True)
class Space:
    """Values of every parameter, None among them for what the rule chooses."""

    tile: tuple[tuple[int, int] | None, ...]
    steps: tuple[int | None, ...]
    fetch: tuple[bool | None, ...]
    division: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, task: Task, machine: Machine) -> Space:
        """What the kernel of a task can be told."""
        function = ir.load_json(task.function)
        tiles = tuple(
            (tall, wide)
            for wide in range(1, _MOST_WIDE + 1)
            for tall in range(1, machine.registers)
            if tall * wide + wide + 1 <= machine.registers and tall * wide >= _FEWEST_SUMS
        )
        shared = _DIVISIONS[task.kind](function, machine)
        tiled = task.kind not in ("depthwise",)
        steps = task.kind in ("product", "strassen", "winograd", "convolution", "expanded")
        fetches = task.kind in ("product", "strassen", "winograd", "convolution")
        return cls(
            (None, *tiles) if tiled else (None,),
            (None, *_STEPS) if steps else (None,),
            (None, False) if fetches else (None,),
            (None, *sorted(set(shared))),
        )

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return len(self.tile) * len(self.steps) * len(self.fetch) * len(self.division)

    def drawn(self, chance: random.Random) -> Choices:
        """Some choices, most of them left to the rules."""
        return Choices(**{name: self._value(name, chance) for name in _NAMES})

    def changed(self, choices: Choices, chance: random.Random) -> Choices:
        """The choices with one parameter drawn anew, sometimes two."""
        names = chance.sample(_NAMES, 1 if chance.random() < 0.6 else 2)
        return replace(choices, **{name: self._value(name, chance) for name in names})

    def crossed(self, parents: Sequence[Choices], chance: random.Random) -> Choices:
        """Each parameter from one of several."""
        return Choices(**{name: getattr(chance.choice(parents), name) for name in _NAMES})

    def holds(self, choices: Choices) -> bool:
        """Whether a kernel of this space can be told these."""
        return all(getattr(choices, name) in getattr(self, name) for name in _NAMES)

    def _value(self, name: str, chance: random.Random) -> Any:
        values: Sequence[Any] = getattr(self, name)
        return None if chance.random() < _LEFT_TO_RULES else chance.choice(values)

    def unseen(self, seen: set[Choices], known: Sequence[Choices], count: int, chance: random.Random) -> list[Choices]:
        """Up to `count` choices that were not met: some at random, some near or between the best known."""
        found: list[Choices] = []
        for _ in range(count * 20):
            if len(found) == count:
                break
            lot = chance.random()
            if not known or lot < 0.35:
                made = self.drawn(chance)
            elif lot < 0.8 or len(known) < 2:
                made = self.changed(chance.choice(known), chance)
            else:
                made = self.crossed(chance.sample(known, 2), chance)
            if made != RULES_CHOOSE and made not in seen:
                seen = seen | {made}
                found.append(made)
        return found


_NAMES = tuple(field.name for field in fields(Choices))


def _product(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    one = _one(function)
    rows, depth, vectors = Rows.of(one.reads[0].shape).count, int(one.reads[0].shape[-1]), int(one.reads[1].shape[0])
    return [
        (plan.blocks, plan.groups, plan.chunks)
        for plan in divisions(rows, depth, machine)
        if plan.groups <= vectors and (plan.chunks == 1 or vectors >= 2 * plan.groups)
    ]


def _strassen(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    one = _one(function)
    pairs, _, short, lanes = (int(size) for size in one.reads[2].shape)
    rows, columns = Rows.of(one.reads[0].shape).count, int(one.result.shape[-1])
    whole = 2 * pairs * lanes == columns  # else two tasks would compute what both halves have, and round differently
    return [
        (plan.blocks, plan.groups, plan.chunks)
        for plan in divisions(rows, short, machine)
        if -(-rows // plan.blocks) >= 2 and (plan.groups == 1 or (whole and plan.groups <= pairs))
    ]


def _convolution(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    one = _one(function)
    groups, weight = int(one.notes["groups"]), one.reads[1]
    height, vectors = Window.read(one.notes).result[0], int(weight.shape[0]) // groups
    return [(rows, parts) for rows in _shares(height) for parts in _groups(vectors, machine)]


def _winograd(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    one = _one(function)
    (rows, columns), m = Window.read(one.notes).result, int(one.notes["square"])
    squares, vectors = -(-rows // m) * -(-columns // m), int(one.reads[2].shape[1])
    return [(block, groups) for block in _shares(squares) for groups in _groups(vectors, machine)]


def _expanded(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    chain = read_chain(function)
    if chain is None:
        return []
    first, second = chain
    height, vectors = Window.read(second.notes).result[0], int(first.reads[1].shape[0])
    return [(rows, group) for rows in _shares(height) for group in _shares(vectors)]


def _depthwise(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    height = Window.read(_one(function).notes).result[0]
    return [(rows, tall) for rows in _shares(height) for tall in (2, 3, 4, 6, 7, 8, 10, 12, 14) if tall < 15]


def _matmul(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    rows = int(_one(function).result.shape[-2])
    return [(most,) for most in _shares(rows)]


def _attention(function: Any, machine: Machine) -> list[tuple[int, ...]]:
    return [(vectors,) for vectors in (1, 2, 3, 4)]


_DIVISIONS = {
    "product": _product,
    "strassen": _strassen,
    "convolution": _convolution,
    "winograd": _winograd,
    "expanded": _expanded,
    "depthwise": _depthwise,
    "matmul": _matmul,
    "attention": _attention,
}


def _one(function: Any) -> Fused:
    found = read_fused(function)
    assert found is not None  # a rule has written its kernel
    return found


def _shares(length: int) -> list[int]:
    """Sizes of a task: a length cut into 1, 2, 3, ... pieces, as equal as they can be."""
    pieces = {*range(1, 17), *(2**n for n in range(5, 12)), length}
    return sorted({-(-length // n) for n in pieces if n <= length})


def _groups(vectors: int, machine: Machine) -> list[int]:
    """Into how many groups of columns to divide the work of all threads."""
    return [n for n in sorted({1, 2, 4, machine.threads, 2 * machine.threads}) if n <= vectors]
