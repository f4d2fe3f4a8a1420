"""One budget over all that makes a model smaller: fewer layers, narrower ones, lower ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graphopt.analysis.widths import layer_macs
from graphopt.deployed import Deployed
from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.names import nearest
from graphopt.passes._output_error import OutputError
from graphopt.passes._splits import SHARES, Split, best_split, goals
from graphopt.passes.low_rank import LowRank
from graphopt.passes.merge_layers import MergeLayers
from graphopt.passes.prune_channels import PruneChannels
from graphopt.rewriter import Rewriter
from graphopt.solve import BudgetError
from graphopt.target import Target
from graphopt.transform import Contract, Pass

__all__ = ["Compress"]

_WAYS = ("merge-layers", "prune-channels", "low-rank")
"""In the order in which they take their turns: layers are found in what was captured, ranks in what is left."""

_ENOUGH = 0.99
"""Of what is left: a step that is asked for no more than that would change little."""

_CORRECTIONS = 3


@dataclass(frozen=True)
class Compress(Pass):
    """Bring a model to a budget by fewer layers, narrower layers and lower ranks, whichever together lose least.

    What:
        The budget is split over `merge-layers`, `prune-channels` and `low-rank`, which take their turns in this order.
        Which share each of them gets is found by doing it: the split whose result is nearest to the original's outputs.

    Algebra:
        With shares s_1 + s_2 + s_3 = 4 and a budget b, each pass is to leave b^(s_1/4), b^((s_1+s_2)/4), b of the
        original's cost; what one leaves unused, as its steps are coarse, the next one may use. Minimise
        ||f(x) - f_s(x)|| / ||f(x)|| over s, by moving one share at a time from the best pass alone.

    When it applies:
        To models in evaluation mode, with calibration data; each pass to what it applies to. Options: `macs` or
        `latency`, the part of it to keep at the sizes of the example, for a latency the `target` and the number of
        `threads`; `ways`, the passes to use; `seed`.

    Safety:
        Lossy: train the result (`graphopt.train.finetune`). Each pass keeps its own promises. Splits are compared by
        the error of the outputs on the last batch of the calibration data, which they were not fitted to where there
        are several; the result is fitted to all of it. What is reported as achieved is measured on the whole model. A
        model that trains back well after one pass and badly after another is not foreseen by that.

    Cost:
        That of its passes, for about five splits of two ways and nine of three, and once more for the result. Tables
        and latencies are remembered on disk and shared by all of them.

    Source:
        Ours. Budgets over several kinds of compression by search: He et al., AMC, ECCV 2018.

    Example:
        >>> import torch, graphopt
        >>> conv = torch.nn.Conv2d
        >>> net = torch.nn.Sequential(conv(3, 16, 3), torch.nn.ReLU(), conv(16, 32, 3), torch.nn.ReLU(), conv(32, 4, 1))
        >>> images = torch.randn(8, 3, 12, 12)
        >>> model = graphopt.capture(net.eval(), (images,))
        >>> small, (report,) = graphopt.run(model, "compress{macs=0.5}", calib=[(images,)])
        >>> report.cost_after.macs <= 0.5 * report.cost_before.macs
        True
    """

    name: ClassVar[str] = "compress"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")

    macs: float | None = None
    latency: float | None = None
    target: str = "cpu"
    threads: int | None = None
    ways: tuple[str, ...] = _WAYS
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        budget, part = self._checked(rw)
        original = rw.model.clone(share_tensors=True)
        trials = _Trials(self, budget, part, original, rw.calib)
        split = best_split(len(self._ways), trials.loss)
        if split is None:
            raise BudgetError(
                f"a part of {part:g} cannot be reached" + trials.reached(),
                why="; ".join(dict.fromkeys(trials.refused)) or None,
                todo="ask for less, or allow more `ways`",
            )
        steps = trials.steps[split]
        found = {}
        for step in steps:
            rw.findings = {}
            step.run(rw)
            found[step.name] = rw.findings
        rw.findings = {
            "budget": {budget: part},
            "achieved": {budget: trials.left(rw.model)},
            "passes": ",".join(map(str, steps)),
            "output error": OutputError(original, rw.calib).of(rw.model),
            "tried": trials.rows(split),
            **{name: _told(findings) for name, findings in found.items()},
        }

    @property
    def _ways(self) -> tuple[str, ...]:
        return tuple(name for name in _WAYS if name in self.ways)

    def step(self, name: str, budget: str, part: float) -> Pass:
        """The pass of a way, asked for a part of what it gets."""
        rounded = math.floor(part * 1e4) / 1e4  # reads well in reports, and never asks for more than is left
        where: dict[str, Any] = {"target": self.target, "threads": self.threads} if budget == "latency" else {}
        kinds: dict[str, Callable[..., Pass]] = {
            "merge-layers": MergeLayers,
            "prune-channels": PruneChannels,
            "low-rank": LowRank,
        }
        return kinds[name](**{budget: rounded}, **where, seed=self.seed)

    def counted(self, original: Model) -> Callable[[Model], float]:
        """The part of the original's cost that a model has."""
        if self.latency is not None:
            return Deployed(original, Stopwatch(Target.parse(self.target), self.threads)).part
        whole = sum(layer_macs(original).values())
        return lambda model: sum(layer_macs(model).values()) / whole

    def _checked(self, rw: Rewriter) -> tuple[str, float]:
        given = {name: part for name in ("macs", "latency") if (part := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UsageError("it needs one budget", todo="give macs=0.5 or latency=0.5, the part to keep")
        ((name, part),) = given.items()
        if not 0 < part < 1:
            raise UsageError(f"{name} is {part:g}, it has to be between 0 and 1")
        for way in self.ways:
            if way not in _WAYS:
                raise UsageError(f"there is no way '{way}'", todo=nearest(way, _WAYS))
        if not self.ways:
            raise UsageError("it has no ways to reach a budget", todo=f"give some of {', '.join(_WAYS)}")
        if rw.model.mode == "train":
            raise UsageError("models are compressed in evaluation mode", todo="call eval() on the model first")
        if not rw.calib:
            raise UsageError(
                "ways are compared on calibration data, and there is none",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        return name, part


class _Trials:
    """What splits of the budget lose, found by doing it.

    Attributes:
        steps: by split, the passes that keep the budget.
        refused: why passes could not do their share.
        smallest: the least part of the original's cost that was reached.
    """

    def __init__(
        self, options: Compress, budget: str, part: float, original: Model, calib: Sequence[Sequence[Tensor]]
    ) -> None:
        self.options, self.budget, self.part, self.original = options, budget, part, original
        self.fit, judged = (calib[:-1], calib[-1:]) if len(calib) > 1 else (calib, calib)
        self.error = OutputError(original, judged)
        self.left = options.counted(original)
        self.steps: dict[Split, list[Pass]] = {}
        self.refused: list[str] = []
        self.smallest = 1.0
        self._losses: dict[Split, float] = {}

    def loss(self, split: Split) -> float:
        self._losses[split] = self._loss(split)
        return self._losses[split]

    def reached(self) -> str:
        """What came nearest to the budget, where something was made at all."""
        return f": {self.smallest:.2g} is the smallest that was" if self.smallest < 1 else ""

    def rows(self, chosen: Split) -> list[dict[str, Any]]:
        return [
            {
                "split": self._named(split),
                "output error": loss if math.isfinite(loss) else "not reached",
                "": "taken" if split == chosen else "",
            }
            for split, loss in self._losses.items()
        ]

    def _named(self, split: Split) -> str:
        ways = zip(self.options._ways, split, strict=True)
        return ", ".join(f"{name} {count}/{SHARES}" for name, count in ways if count)

    def _loss(self, split: Split) -> float:
        """The error of the outputs, infinite where the budget is not kept."""
        asked = list(goals(split, self.part))
        last = max(place for place, count in enumerate(split) if count)
        for _ in range(_CORRECTIONS):
            try:
                steps, model = self._done(split, asked)
            except BudgetError as refused:
                self.refused.append(refused.what)
                return math.inf
            reached = self.left(model)
            self.smallest = min(self.smallest, reached)
            if reached <= self.part:
                self.steps[split] = steps
                error = self.error.of(model)
                return error if math.isfinite(error) else math.inf
            asked[last] *= 0.995 * self.part / reached  # parts of parts were measured each by itself
        return math.inf

    def _done(self, split: Split, asked: Sequence[float]) -> tuple[list[Pass], Model]:
        model = self.original.clone(share_tensors=True)
        left, steps = 1.0, list[Pass]()
        for name, count, goal in zip(self.options._ways, split, asked, strict=True):
            if not count or goal > _ENOUGH * left:
                continue
            steps.append(self.options.step(name, self.budget, goal / left))
            steps[-1].run(Rewriter(model, calib=self.fit))
            model.touch()
            left = self.left(model)
        return steps, model


def _told(findings: dict[str, Any]) -> dict[str, Any]:
    """What a pass of a way reports in numbers and words; its tables are those of the pass by itself."""
    return {name: value for name, value in findings.items() if isinstance(value, (int, float, str))}
