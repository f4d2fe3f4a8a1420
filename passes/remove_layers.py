"""Depth pruning: whole residual blocks and transformer layers go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphopt.check import Oracle
from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.passes._blocks import Block, find_blocks, named
from graphopt.passes._branches import erase, zeroed
from graphopt.passes._goals import COUNTED, Goal, Part, PartOfLatency
from graphopt.passes._output_error import OutputError
from graphopt.passes._shortening import Shortening
from graphopt.rewriter import Rewriter
from graphopt.space import Choices, Range, Space
from graphopt.target import Target
from graphopt.transform import Contract, Pass

__all__ = ["RemoveLayers"]


@dataclass(frozen=True)
class RemoveLayers(Pass):
    """Remove whole residual blocks or transformer layers until a budget is met.

    What:
        A block is what is added to a value that goes past it: the convolutions of a residual block, the attention and
        the MLP of a transformer layer. The blocks that are worth least on calibration data go, and what they were added
        to takes the place of the sum. What is left is an ordinary shallower model.

    Algebra:
        y = x + f(x) becomes y = x, and y = s(x) + f(x) becomes y = s(x). A block is worth 1 - mean cos(x, y), the mean
        over the positions of x and y [..., features] (`similarity`), or the root of sum |o' - o|^2 / sum |o|^2, o the
        outputs and o' those without it (`loss`). Under a budget the block goes for which the worth, squared for `loss`,
        divided by what it saves of what still has to go is least.

    When it applies:
        To operands of sums that have one entry and one exit, found by the flow of values and not by names or types:
        with projections or without, in each other, with weights that other blocks use as well. What is used elsewhere,
        reads an input of its own (such as a mask that is given to attention), is random, or would make an input of the
        model an output of it, stays, with the reason. The model has to be in evaluation mode.
        Options: one of `count`, how many blocks go, and `macs`, `params` or `latency`, the part to keep; for a latency,
        which is measured on compiled code at the sizes of the example, the `target` and the number of `threads`;
        `importance`, `loss` by default; `iterate`, whether the rest is measured again after each removal (for `loss` by
        default, unless that takes over 2000 runs on a batch); `unit`, `layer` for attention together with the branch
        right behind it, `branch` for each alone; `only` and `leave`, names of blocks or of modules that they are in.

    Safety:
        Lossy. Proven on the spot: the shorter model computes what the original does with zeros in the place of what
        has gone, within the rounding of float, or the pass fails. Needs calibration data.

    Cost:
        `similarity` is one run over the calibration data, `loss` one for each block, again after each removal with
        `iterate`. A latency needs compilations: of every layer that was never measured on such a target, and of the
        model after every removal.

    Source:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024, for the
        similarity; Kim et al., Shortened LLaMA: A Simple Depth Pruning for Large Language Models, 2024, for removal by
        what is lost; Ashok et al., N2N Learning, ICLR 2018, for removal of layers of convolutional nets.

    Example:
        >>> import torch, graphopt
        >>> class Block(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> linear, tanh = torch.nn.Linear, torch.nn.Tanh()
        >>> blocks = [Block(linear(8, 8), tanh, linear(8, 8)) for _ in range(4)]
        >>> net = torch.nn.Sequential(linear(5, 8), *blocks, linear(8, 3)).eval()
        >>> model = graphopt.capture(net, (torch.randn(2, 5),))
        >>> small, (report,) = graphopt.run(model, "remove-layers{count=2}", calib=[[torch.randn(2, 5)]])
        >>> len(report.findings["removed"]), sum(row["gone"] for row in report.findings["blocks"])
        (2, 2)
    """

    name: ClassVar[str] = "remove-layers"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")
    space: ClassVar[Space | None] = Space(
        budgets={"macs": Range(0.3, 0.95), "latency": Range(0.3, 0.95), "params": Range(0.3, 0.95)},
        options={"unit": Choices.of("layer", "branch")},
        place=0.2,
    )

    count: int | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    target: str = "cpu"
    threads: int | None = None
    importance: Literal["loss", "similarity"] = "loss"
    iterate: bool | None = None
    unit: Literal["layer", "branch"] = "layer"
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    def run(self, rw: Rewriter) -> None:
        self._check(rw)
        error = OutputError(rw.model, rw.calib)
        if not 0 < error.size < math.inf:
            raise UsageError(
                "what blocks are worth cannot be told: the outputs on the calibration data are zero or not finite",
                todo="calibrate with other data",
            )
        blocks = self._blocks(rw)
        search = Shortening(rw, blocks, self.importance, self.iterate, self._goal(rw), self.count, error)
        search.run()
        _erase(rw, search.gone)
        self._report(rw, search)

    def _check(self, rw: Rewriter) -> None:
        given = {
            name: value for name in ("count", "macs", "params", "latency") if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            raise UsageError(
                "it needs one budget", todo="give count=2, or macs=0.7, params=0.7 or latency=0.7, the part to keep"
            )
        ((name, value),) = given.items()
        if name == "count" and value < 1:
            raise UsageError(f"count is {value}, it has to be at least 1")
        if name != "count" and not 0 < value < 1:
            raise UsageError(f"{name} is {value:g}, it has to be between 0 and 1")
        if not rw.calib:
            raise UsageError(
                "it needs calibration data, to measure what blocks are worth",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        if rw.model.mode == "train":
            raise UsageError(
                "it needs a model in evaluation mode",
                why="dropout and statistics of batches would be measured as if they were the blocks' worth",
                todo="call eval() on the model first, and train() on the result",
            )

    def _blocks(self, rw: Rewriter) -> list[Block]:
        """Those that may go, which are enough."""
        blocks = named(find_blocks(rw, self.unit), self.only, self.leave)
        if self.count is not None and self.count > len(blocks):
            names = ", ".join(block.name for block in blocks)
            raise UsageError(
                f"count is {self.count}, and {len(blocks)} blocks can go" + (f": {names}" if names else ""),
                why="\n".join(f"'{miss.node}': {miss.reason}" for miss in rw.misses[:4]) or None,
                todo="ask for fewer, or take branches alone: unit=branch",
            )
        return blocks

    def _goal(self, rw: Rewriter) -> Goal | None:
        if self.latency is not None:
            return PartOfLatency(self.latency, rw.model, Stopwatch(Target.parse(self.target), self.threads))
        for name in COUNTED:
            part = getattr(self, name)
            if part is not None:
                return Part(name, part, rw.model)
        return None

    def _report(self, rw: Rewriter, search: Shortening) -> None:
        goal = search.goal
        rw.findings |= {
            "budget": {"count": self.count} if goal is None else {goal.name: goal.part},
            "achieved": {"count": len(search.gone)} if goal is None else {goal.name: search.left},
            "importance": self.importance,
            "iterated": search.iterate,
            "removed": [{"block": block.name, "importance": search.worth[block]} for block in search.gone],
            "blocks": search.rows(),
            "output error": search.error.of(rw.model),
        }


def _erase(rw: Rewriter, gone: list[Block]) -> None:
    """Erase the blocks, and prove that nothing else has changed."""
    branches = [branch for block in gone for branch in block.branches]
    oracle = Oracle(zeroed(rw.model, branches), rw.calib[:1])
    erase(rw, branches)
    oracle.judge(rw.model, Contract.EXACT)
