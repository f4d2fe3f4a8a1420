"""Structured pruning: channels, heads and features go, to a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.analysis.coupling import Coupling, Group, couple
from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.passes._branches import plan_with_branches
from graphopt.passes._budget import Budget, Latency, Macs, Memory, Params
from graphopt.passes._cutting import cut_and_prove
from graphopt.passes._importance import MEASURES, Measured, measure
from graphopt.passes._plan import Plan, Width, classes_of
from graphopt.printer import module_path
from graphopt.rewriter import Rewriter
from graphopt.space import Choices, Range, Space
from graphopt.target import Target
from graphopt.transform import Contract, Pass

__all__ = ["PruneChannels"]

_COUNTED: dict[str, Callable[[float], Budget]] = {"macs": Macs, "params": Params, "memory": Memory}


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels, heads and features until a budget is met.

    What:
        Units that have to go together (a channel of every convolution that is added up, a head with its queries, keys
        and values) are found by following every axis through the graph. The least important ones of each group go, as
        many as the budget asks for, where they lose least; the result is an ordinary smaller model.

    Algebra:
        Choose for every group a width w: minimise the sum of losses subject to sum of costs <= budget. A group whose
        units are worth S loses -S log(1 - L / S) with units worth L. With calibration data layers W [out, in] are
        refitted to W A, where A x' is the ridge regression of what they read on what is left of it, x'.

    When it applies:
        Everything whose positions can be followed from the layers that make them to those that read them: through
        residual sums, concatenations, splits, shuffles, heads, windows, norms, gates, grouped and transposed
        convolutions, embeddings. Inputs, outputs, and what an unknown operator or an index that depends on data
        touches, stay; each is reported with the reason.
        Options: `macs`, `params`, `memory` (weights and the activations alive at once) or `latency`, the part of it to
        keep at the sizes of the example, one of the four; for a latency the `target` and the number of `threads`;
        `importance`, the measure (`taylor` with calibration data and `magnitude` without, by default); `only` and
        `leave`, names of groups; `most`, the largest part of a group that may go, and `limits`, that of single groups
        as NAME:PART; `step`, of which the widths that stay are multiples (for a latency as many as a vector holds, else
        1; half of that, a quarter, .. in groups of less than two); `branches`, whether whole operands of sums may go as
        well (residual blocks, attention); `refit`; `seed`.

    Safety:
        Lossy. Proven on the spot: the cut model computes what the original does when nobody reads the removed
        positions, within the rounding of float, or the pass fails; a model without branches computes what it does when
        they are zero. What refitting, and going without branches, gain is measured on the calibration data, and each is
        kept only if it gains.

    Cost:
        A walk over the graph, a few runs of the model, an integer program; with `taylor` and `fisher` sixteen backward
        passes for every batch. Refitting keeps what is alive in two runs over all batches. Moments of its layers take
        in x in numbers each. A latency needs compilations: of every layer that was never measured on such a target, and
        of the model for every plan that is tried.

    Source:
        Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023; Shen et al., Structural Pruning via
        Latency-Saliency Knapsack, NeurIPS 2022, for the knapsack; He et al., Channel Pruning, ICCV 2017, for
        refitting; Chen et al., OTOv3, 2023, for branches.

    Example:
        >>> import torch, graphopt
        >>> conv = torch.nn.Conv2d
        >>> net = torch.nn.Sequential(conv(3, 16, 3), torch.nn.ReLU(), conv(16, 32, 3), torch.nn.ReLU(), conv(32, 4, 1))
        >>> model = graphopt.capture(net.eval(), (torch.randn(1, 3, 12, 12),))
        >>> small, (report,) = graphopt.run(model, "prune-channels{macs=0.5}")
        >>> report.cost_after.macs <= 0.5 * report.cost_before.macs
        True
    """

    name: ClassVar[str] = "prune-channels"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")
    space: ClassVar[Space | None] = Space(
        budgets={"macs": Range(0.2, 0.95), "latency": Range(0.2, 0.95), "params": Range(0.2, 0.95)},
        options={
            "importance": Choices.of("taylor", "fisher", "magnitude"),
            "step": Choices.of("16", "8", "4"),
            "branches": Choices.of("false", "true"),
        },
        place=0.6,
    )

    macs: float | None = None
    params: float | None = None
    memory: float | None = None
    latency: float | None = None
    target: str = "cpu"
    threads: int | None = None
    importance: Measured | None = None
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    most: float = 0.9
    limits: tuple[str, ...] = ()
    step: int | None = None
    branches: bool = False
    refit: bool | None = None
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        budget = self._budget()
        importance = self._importance(rw)
        self._check_branches(rw, importance)
        refit = self._refits(rw)
        coupling = couple(rw.model)
        groups, limits = self._groups(coupling), self._limits(coupling)
        _report_pinned(rw, coupling)

        def plan_of(coupling: Coupling, groups: Sequence[Group]) -> Plan:
            units = measure(importance, coupling, rw.calib, self.seed)
            most = {name: limits.get(name, self.most) for name in coupling.groups}
            return Plan(coupling, budget, units, groups, most=most, step=self.step)

        if self.branches:
            plan, found = plan_with_branches(rw, plan_of, coupling, groups, refit=refit)
        else:
            plan = plan_of(coupling, groups)
            found = plan.widths()
        widths = [width for width in found if width.units]
        _report_refused(rw, plan)
        if widths:
            why = f"{sum(len(width.units) for width in widths)} units of {len(widths)} groups go"
            cut_and_prove(rw, plan.coupling.onto(rw.model), classes_of(widths), why, refit=refit)
        rw.findings |= {
            "budget": {budget.name: budget.part},
            "achieved": {budget.name: plan.achieved},
            "importance": importance,
            "groups": [_row(width) for width in widths],
        }

    def _budget(self) -> Budget:
        given = {name: part for name in (*_COUNTED, "latency") if (part := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UsageError(
                "it needs one budget", todo="give macs=0.5, params=0.5, memory=0.5 or latency=0.5, the part to keep"
            )
        ((name, part),) = given.items()
        for option, value in ((name, part), ("most", self.most)):
            if not 0 < value < 1:
                raise UsageError(f"{option} is {value:g}, it has to be between 0 and 1")
        if self.step is not None and self.step < 1:
            raise UsageError(f"step is {self.step}, it has to be at least 1")
        if name == "latency":
            return Latency(part, Stopwatch(Target.parse(self.target), self.threads))
        return _COUNTED[name](part)

    def _limits(self, coupling: Coupling) -> dict[str, float]:
        """The groups that have limits of their own."""
        found = {}
        for limit in self.limits:
            name, _, part = limit.rpartition(":")
            if not name or not re.fullmatch(r"0|0?\.\d+|1(\.0*)?", part):
                raise UsageError(f"the limit '{limit}' is none", todo="write NAME:PART, such as layer1.0.conv1:0.25")
            found[coupling.group(name).name] = float(part)
        return found

    def _importance(self, rw: Rewriter) -> str:
        name = self.importance or ("taylor" if rw.calib else "magnitude")
        if MEASURES[name].needs_data and not rw.calib:
            raise UsageError(
                f"the importance '{name}' needs calibration data",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        return name

    def _refits(self, rw: Rewriter) -> bool:
        if self.refit and not rw.calib:
            raise UsageError("refit needs calibration data", todo="give some: calib= in Python, --calib DATA.npz")
        return bool(rw.calib) if self.refit is None else self.refit

    def _check_branches(self, rw: Rewriter, importance: str) -> None:
        if self.branches and not (rw.calib and MEASURES[importance].comparable):
            why = f"scores by '{importance}' are no loss that could be compared with a branch's" if rw.calib else None
            raise UsageError(
                "branches need calibration data" + (" and importance=taylor" if rw.calib else ""),
                why=why,
                todo="give both: calib= in Python, --calib DATA.npz on the command line, and no other importance",
            )
        if self.branches and rw.model.mode == "train":
            raise UsageError("branches need a model in evaluation mode", todo="call eval() on the model first")

    def _groups(self, coupling: Coupling) -> list[Group]:
        wanted = [coupling.group(name) for name in self.only] or list(coupling.groups.values())
        left = {coupling.group(name).name for name in self.leave}
        return [group for group in wanted if group.name not in left]


def _report_pinned(rw: Rewriter, coupling: Coupling) -> None:
    named = {pinned.name: pinned for pinned in coupling.pinned}
    for node in coupling.trace.origins:
        pinned = named.get(module_path(node) or node.name)
        if pinned is not None:
            rw.skip(node, f"its {pinned.size} positions stay: {'; '.join(pinned.reasons) or 'nothing reads them'}")


def _report_refused(rw: Rewriter, plan: Plan) -> None:
    for name, why in plan.refused.items():
        rw.skip(plan.coupling.group(name).members[0].slot.user, f"group '{name}' stays: {why}")


def _row(width: Width) -> dict[str, Any]:
    size = len(width.group.families[width.family])
    return {"group": width.group.name, "units": size, "left": size - len(width.units)}
