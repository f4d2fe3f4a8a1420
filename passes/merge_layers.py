"""Depth compression: several layers become one, to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.passes._linearise import start
from graphopt.passes._merge_losses import Losses, values_at
from graphopt.passes._merge_plan import Goal, Planner
from graphopt.passes._merge_table import Candidate, Replacement, Table
from graphopt.passes._merged_layer import Price, why_not_finite
from graphopt.passes._output_error import OutputError
from graphopt.passes._regression import fitted
from graphopt.rewriter import Node, Rewriter
from graphopt.space import Choices, Range, Space
from graphopt.target import Target
from graphopt.transform import Contract, Pass

__all__ = ["MergeLayers"]

_ENOUGH = {"macs": 0.98, "latency": 0.95}
"""Of the budget: when a plan that meets it uses enough of it."""


@dataclass(frozen=True)
class MergeLayers(Pass):
    """Merge layers of convolutional nets until a budget is met, leaving out the activations between them.

    What:
        Layers that follow each other, and whole blocks with their skip connections, become one convolution each, where
        that is cheaper and loses least. What was left out is made up for by fitting the convolution to what the layers
        make on calibration data.

    Algebra:
        Values x_0 .. x_n that all ways through the net go through. For i < j and every window k a convolution
        W [out, in, k, k] with a cost T(i, j, k), and a loss I(i, j, k): the squared error of the net's outputs with
        that convolution alone. W starts from the composition of all layers in between without their activations (a
        skip is the identity in its middle), or from the identity where there is something else in between, and is moved
        by ridge regression of x_j on patches of x_i. Choose i_0 = 0 < i_1 < .. < n: minimise the sum of losses subject
        to sum of costs <= budget, exactly, by dynamic programming. Then all are fitted once more, in the order of the
        graph, each to the original's x_j on the inputs that it really gets.

    When it applies:
        To models in evaluation mode, on images [n, channels, *sizes] with one or two axes: chains of convolutions,
        residual blocks with and without projections, inverted residuals, and blocks with norms, gates or pooling in
        them. A batch norm behind the last layer of a stretch stays, and where others were left out the convolution gets
        one that changes nothing, for training; `exact` folds them. Left alone, each with the reason:
        unknown operators, random numbers, layers whose one convolution would not be cheaper. Weights that are shared
        are read and stay for their other users.
        Options: `macs` or `latency`, the part of it to keep at the sizes of the example; for a latency the `target` and
        the number of `threads`; `largest`, the widest window; `longest`, how many layers may become one; `plan`
        (`one-stage`, or `two-stage`, which looks for stretches to make linear first and cuts those, without choosing
        windows); `importance`, which measures a loss: `calibration`, or MODULE:FUNCTION, a function of yours from a
        model to what it loses; `tune`, epochs of training every candidate towards the original's outputs first; `seed`.

    Safety:
        Lossy: train the result (`graphopt.train.finetune`). The table of losses is measured on the calibration data,
        latencies of single layers on the target, and the budget on the whole compiled model. Plans are coarse where
        layers are few: where more than a twentieth of a latency is left unused (a fiftieth of `macs`), the report has
        what the next larger plan takes, and loses.

    Cost:
        For every candidate a regression and a run over the calibration data; remembered on disk, so that another
        budget costs nothing of it. A latency needs compilations of every layer and candidate, remembered too, and of
        the model for every plan that is tried.

    Source:
        Kim et al., Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming, ICML 2023; Kim et
        al., LayerMerge: Neural Network Depth Compression through Layer Pruning and Merging, ICML 2024. Fitting the
        merged layer in the place of training every block is ours.

    Example:
        >>> import torch, graphopt
        >>> conv = torch.nn.Conv2d
        >>> net = torch.nn.Sequential(conv(8, 32, 1), torch.nn.ReLU(), conv(32, 32, 3, padding=1), torch.nn.ReLU(),
        ...                           conv(32, 8, 1), torch.nn.ReLU(), conv(8, 8, 3, padding=1))
        >>> images = torch.randn(16, 8, 10, 10)
        >>> model = graphopt.capture(net.eval(), (images,))
        >>> small, (report,) = graphopt.run(model, "merge-layers{macs=0.5}", calib=[(images,)])
        >>> report.cost_after.macs <= 0.5 * report.cost_before.macs
        True
    """

    name: ClassVar[str] = "merge-layers"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")
    space: ClassVar[Space | None] = Space(
        budgets={"macs": Range(0.4, 0.95), "latency": Range(0.4, 0.95)},
        options={"largest": Choices.of("7", "5", "3")},
        place=0.4,
    )

    macs: float | None = None
    latency: float | None = None
    target: str = "cpu"
    threads: int | None = None
    largest: int = 7
    longest: int = 8
    plan: Literal["one-stage", "two-stage"] = "one-stage"
    importance: str = "calibration"
    tune: int = 0
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        name, part = self._checked(rw)
        table = Table(rw, self._price(rw.model), largest=self.largest, longest=self.longest)
        table.report()
        if not table.candidates:
            rw.findings |= {"merged": [], "nothing to merge": "no convolution is cheaper than several layers are"}
            return
        original = rw.model.clone(share_tensors=True)
        losses = Losses(original, rw.calib, self.importance, self.tune)
        goal = Goal(original, self._watch() if name == "latency" else None)
        planner = Planner(table, losses.of(table.candidates), goal, two_stage=self.plan == "two-stage")
        plan = planner.within(part, _ENOUGH[name])
        rw.findings |= {"budget": {name: part}, "achieved": {name: plan.reached, "loss": plan.loss}}
        if planner.beyond is not None and planner.beyond.loss < plan.loss:
            rw.findings["next larger plan"] = {name: planner.beyond.reached, "loss": planner.beyond.loss}
        rw.findings["merged"] = [_row(one, planner.losses[one.label]) for one in plan.chosen]
        _merge(rw, original, plan.chosen, self.seed)

    def _watch(self) -> Stopwatch:
        return Stopwatch(Target.parse(self.target), self.threads)

    def _price(self, model: Model) -> Price:
        return Price(model, self.target if self.latency is not None else None, self.threads)

    def _checked(self, rw: Rewriter) -> tuple[str, float]:
        given = {name: part for name in ("macs", "latency") if (part := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UsageError("it needs one budget", todo="give macs=0.5 or latency=0.5, the part to keep")
        ((name, part),) = given.items()
        if not 0 < part < 1:
            raise UsageError(f"{name} is {part:g}, it has to be between 0 and 1")
        for option, least in (("largest", 1), ("longest", 2), ("tune", 0)):
            if getattr(self, option) < least:
                raise UsageError(f"{option} is {getattr(self, option)}, it has to be at least {least}")
        if rw.model.mode == "train":
            raise UsageError("layers are merged in evaluation mode", todo="call eval() on the model first")
        if not rw.calib:
            raise UsageError(
                "what merged layers lose is measured on calibration data, and there is none",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        return name, part


def _merge(rw: Rewriter, original: Model, chosen: Sequence[Candidate], seed: int) -> None:
    """Replace regions in order, each fitted to what the original makes of what it gets now."""
    replacement = Replacement(rw)
    for one in chosen:
        part = replacement.region(one)
        xs = values_at(rw.model, rw.calib, {part.source.name})[part.source.name]
        ys = values_at(original, rw.calib, {part.target.name})[part.target.name]
        kernel = fitted(start(rw, part, one.size), xs, ys, seed)
        why = why_not_finite(kernel, ys[0].dtype)
        if why is not None:
            raise UsageError(f"'{part.target.name}' cannot be merged", why=why)
        replacement.replace(part, kernel, xs)
    rw.model.touch()
    rw.findings["output error"] = OutputError(original, rw.calib).of(rw.model)


def _row(one: Candidate, loss: float) -> dict[str, Any]:
    named: list[Node] = [one.part.source, one.part.target]
    ends = [node.name for node in named]
    return {"from": ends[0], "to": ends[1], "layers": len(one.part.steps), "window": one.size, "loss": loss}
