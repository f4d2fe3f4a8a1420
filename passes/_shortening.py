"""Which blocks of a model go: the one that is worth least, again and again, until that is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.passes._blocks import Block, outermost, why_needed, without
from graphopt.passes._goals import Goal
from graphopt.passes._layer_importance import block_influence, output_losses
from graphopt.passes._output_error import OutputError
from graphopt.rewriter import Rewriter
from graphopt.solve import BudgetError

__all__ = ["Shortening"]

_MOST_RUNS = 2000
"""Blocks are measured again after each removal if that takes no more runs of the model on a batch."""


@dataclass
class Shortening:
    """The search for the blocks that go.

    Attributes:
        worth: what each block was found to be worth when it was measured last; measured on the whole model at first.
        first: what each was worth in the whole model.
        gone: those that go, the order of removal kept; none is inside of another one.
        left: the part of the cost that is left without them; None where only their number counts.
    """

    rw: Rewriter
    blocks: Sequence[Block]
    importance: str
    iterate: bool | None
    goal: Goal | None
    count: int | None
    error: OutputError
    worth: dict[Block, float] = field(default_factory=dict)
    first: dict[Block, float] = field(default_factory=dict)
    saved: dict[Block, float] = field(default_factory=dict)
    gone: list[Block] = field(default_factory=list)
    left: float | None = None

    def __post_init__(self) -> None:
        rounds = len(self.blocks) if self.count is None else self.count
        runs = sum(range(len(self.blocks), max(0, len(self.blocks) - rounds), -1)) * len(self.rw.calib)
        if self.iterate is None:
            self.iterate = self.importance == "loss" and runs <= _MOST_RUNS

    def run(self) -> None:
        """Choose.

        Raises:
            BudgetError: when all that may go is not enough.
        """
        self._measure(list(self.blocks))
        self.first = dict(self.worth)
        if self.goal is not None:
            self.saved = {block: self.goal.saved(without(self.rw.model, [block]), block.nodes) for block in self.worth}
        smallest = 1.0
        while not self._is_enough():
            rest = self._rest()
            if not rest:
                raise self._unreachable(smallest)
            if self.iterate and self.gone:
                self._measure(rest)
                rest = self._rest()
            if rest:
                self._remove(min(rest, key=self._rank))
                smallest = min(smallest, self.left or 1.0)
        self._put_back()

    def _is_enough(self) -> bool:
        if self.goal is None:
            return len(self.gone) == self.count
        return self.left is not None and self.left <= self.goal.part

    def _rest(self) -> list[Block]:
        inside = [block for block in self.worth if block not in outermost([*self.gone, block])]
        return [block for block in self.worth if block not in self.gone and block not in inside]

    def _measure(self, blocks: list[Block]) -> None:
        """What blocks are worth in the model without those that have gone; those of which that cannot be told stay."""
        if self.importance == "loss":
            found = output_losses(self.rw.model, self.error, blocks, self.gone)
        else:
            found = block_influence(without(self.rw.model, self.gone), blocks, self.rw.calib)
        self.worth |= found
        for block, value in found.items():
            if not math.isfinite(value):
                what = "without it the outputs are" if self.importance == "loss" else "what goes in or comes out is"
                self._keep(block, f"{what} not finite")

    def _keep(self, block: Block, why: str) -> None:
        del self.worth[block]
        self.rw.skip(block.branches[-1].add, f"block '{block.name}' stays: {why}")

    def _rank(self, block: Block) -> tuple[float, float]:
        """Small for what is worth little, for what it saves of what still has to go. Errors add up as squares."""
        value = self.worth[block]
        if self.goal is None:
            return 0.0, value
        loss = value**2 if self.importance == "loss" else value
        saved = min(self.saved[block], (1.0 if self.left is None else self.left) - self.goal.part)
        return loss / saved if saved > 0 else math.inf, value

    def _remove(self, block: Block) -> None:
        gone = outermost([*self.gone, block])
        shorter = without(self.rw.model, gone)
        why = why_needed(shorter)
        if why is not None:
            self._keep(block, why)
            return
        self.gone = gone
        if self.goal is not None:
            self.left = self.goal.left(shorter)

    def _put_back(self) -> None:
        """Blocks that went before a dearer one did, and that the budget is met with as well."""
        if self.goal is None or not self.goal.exact:
            return
        for block in sorted(self.gone, key=lambda one: -self.worth[one]):
            others = [one for one in self.gone if one is not block]
            left = self.goal.left(without(self.rw.model, others))
            if left <= self.goal.part:
                self.gone, self.left = others, left

    def _unreachable(self, smallest: float) -> BudgetError:
        todo = "ask for less, name fewer blocks in `leave` or more in `only`, or take branches alone: unit=branch"
        if self.goal is None:
            return BudgetError(
                f"count={self.count} cannot be met: {len(self.gone)} blocks can go",
                why=None if self.blocks else "the model has no block that could go",
                todo=todo,
            )
        return BudgetError(
            f"{self.goal.name}={self.goal.part:g} cannot be met: {smallest:.3g} is the smallest that was reached",
            why=f"that is without the {len(self.gone)} blocks that can go",
            todo=todo,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Every block that was measured: its branches, what it was worth, what it saves, and whether it goes."""
        return [
            {
                "block": block.name,
                "branches": [branch.name for branch in block.branches],
                "importance": value,
                **({"saves": self.saved[block]} if block in self.saved else {}),
                "gone": block in self.gone,
            }
            for block, value in self.first.items()
        ]
