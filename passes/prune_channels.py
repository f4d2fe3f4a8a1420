"""Structured pruning: channels, heads and features go, to a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.analysis.coupling import Coupling, Group, couple
from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.passes._budget import Budget, Latency, Macs, Params
from graphopt.passes._cutting import cut_and_prove
from graphopt.passes._importance import MEASURES, measure
from graphopt.passes._plan import Plan, Width, classes_of
from graphopt.printer import module_path
from graphopt.rewriter import Rewriter
from graphopt.target import Target
from graphopt.transform import Contract, Pass

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels, heads and features until a budget is met.

    What:
        Units that have to go together (a channel of every convolution that is added up, a head with its queries, keys
        and values) are found by following every axis through the graph. The least important ones of each group go, as
        many as the budget asks for, where they lose least; the result is an ordinary smaller model.

    Algebra:
        Choose for every group a width w: minimise the sum of losses subject to sum of costs <= budget. With calibration
        data the readers W [out, in] of removed inputs R are refitted: W_K + W_R C_RK C_KK^+, C the second moments of
        their inputs.

    When it applies:
        Everything whose positions can be followed from the layers that make them to those that read them: through
        residual sums, concatenations, splits, shuffles, heads, windows, norms, gates, grouped and transposed
        convolutions, embeddings. Inputs, outputs, and what an unknown operator or an index that depends on data
        touches, stay; each is reported with the reason.
        Options: `macs`, `params` or `latency`, the part of it to keep, one of the three; for a latency the `target` and
        the number of `threads`; `importance`, the measure (`taylor` with calibration data and `magnitude` without, by
        default); `only` and `leave`, names of groups; `most`, the largest part of a group that may go; `step`, of which
        the widths that stay are multiples (for a latency as many as a vector holds, else 1); `refit`; `seed`.

    Safety:
        Lossy. Proven on the spot: the cut model computes what the original does when nobody reads the removed
        positions, within the rounding of float, or the pass fails. What refitting gains is measured on the
        calibration data, and it is kept only if it gains.

    Cost:
        Seconds: a walk over the graph, a few runs of the model, an integer program. Moments of refitted layers take
        in x in numbers each. A latency needs compilations: of every layer that was never measured on such a target, and
        of the model for every plan that is tried.

    Source:
        Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023; Shen et al., Structural Pruning via
        Latency-Saliency Knapsack, NeurIPS 2022, for the knapsack.

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

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    target: str = "cpu"
    threads: int | None = None
    importance: Literal["taylor", "activation", "magnitude", "l1", "bn-scale", "median", "random"] | None = None
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    most: float = 0.9
    step: int | None = None
    refit: bool | None = None
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        budget = self._budget(rw)
        importance = self._importance(rw)
        coupling = couple(rw.model)
        groups = self._groups(coupling)
        _report_pinned(rw, coupling)
        plan = Plan(
            coupling,
            budget,
            measure(importance, coupling, rw.calib, self.seed),
            groups,
            most=self.most,
            step=self.step,
        )
        widths = [width for width in plan.widths() if width.units]
        _report_refused(rw, coupling, plan)
        if widths:
            why = f"{sum(len(width.units) for width in widths)} units of {len(widths)} groups go"
            cut_and_prove(rw, coupling, classes_of(widths), why, refit=self._refits(rw))
        rw.findings |= {
            "budget": {budget.name: budget.part},
            "achieved": {budget.name: plan.achieved},
            "importance": importance,
            "groups": [_row(width) for width in widths],
        }

    def _budget(self, rw: Rewriter) -> Budget:
        given = {name: part for name in ("macs", "params", "latency") if (part := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UsageError("it needs one budget", todo="give macs=0.5, params=0.5 or latency=0.5, the part to keep")
        ((name, part),) = given.items()
        for option, value in ((name, part), ("most", self.most)):
            if not 0 < value < 1:
                raise UsageError(f"{option} is {value:g}, it has to be between 0 and 1")
        if self.step is not None and self.step < 1:
            raise UsageError(f"step is {self.step}, it has to be at least 1")
        if name == "latency":
            watch = Stopwatch(Target.parse(self.target), self.threads)
            return Latency(part, watch, rw.calib[0] if rw.calib else ())
        return Macs(part) if name == "macs" else Params(part)

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


def _report_refused(rw: Rewriter, coupling: Coupling, plan: Plan) -> None:
    for name, why in plan.refused.items():
        rw.skip(coupling.group(name).members[0].slot.user, f"group '{name}' stays: {why}")


def _row(width: Width) -> dict[str, Any]:
    size = len(width.group.families[width.family])
    return {"group": width.group.name, "units": size, "left": size - len(width.units)}
