"""Whole branches that go, beside channels: which of them a budget is best met without, and how they are left out.

A branch is lost at what is measured: the error of the outputs on calibration data when it counts as zero. That is on
the scale on which the losses of units are estimated, so that one knapsack can choose between the two. Channels are then
planned anew for what is left, and the whole is kept only if the outputs are no further away than with channels alone.
(Erased operators: Chen et al., OTOv3: Automatic Architecture-Agnostic Neural Network Training and Compression, 2023.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from graphopt.analysis.branches import Branch, branches
from graphopt.analysis.coupling import Coupling, Group, couple
from graphopt.analysis.removal import Conflict, Removal
from graphopt.check import Oracle
from graphopt.errors import GraphoptError, UsageError
from graphopt.model import Model
from graphopt.passes._cutting import cut_copy
from graphopt.passes._layout import relax_views
from graphopt.passes._output_error import OutputError
from graphopt.passes._plan import Plan, Width, classes_of
from graphopt.passes._refit import refit as refit_layers
from graphopt.passes._tradeoff import Tradeoff
from graphopt.rewriter import Rewriter
from graphopt.solve import BudgetError
from graphopt.transform import Contract

__all__ = ["erase", "plan_with_branches", "zeroed"]

aten = torch.ops.aten


def erase(rw: Rewriter, gone: Sequence[Branch]) -> None:
    """Let the other operand stand for each sum; what only the branch needed goes with it."""
    named = {node.name: node for node in rw.graph.nodes}
    for branch in gone:
        add = named[branch.add.name]
        kept = rw.argument(add, "self" if branch.operand else "other")
        rw.replace(add, kept, f"without the branch '{branch.name}'")
    relax_views(rw)
    rw.model.touch()


def zeroed(model: Model, gone: Sequence[Branch]) -> Model:
    """A copy of the model that adds zeros in the place of the branches."""
    copy = model.clone(share_tensors=True)
    rw = Rewriter(copy)
    named = {node.name: node for node in rw.graph.nodes}
    for branch in gone:
        add = named[branch.add.name]
        operand = rw.argument(add, "other" if branch.operand else "self")
        zeros = rw.call(aten.zeros_like.default, operand, before=add)
        rw.replace_input(add, operand, zeros, f"zeros for the branch '{branch.name}'")
    copy.touch()
    return copy


def plan_with_branches(
    rw: Rewriter,
    plan_of: Callable[[Coupling, Sequence[Group]], Plan],
    coupling: Coupling,
    groups: Sequence[Group],
    *,
    refit: bool,
) -> tuple[Plan, list[Width]]:
    """The better of two plans: of channels alone, and of channels of the model without some branches, which the model
    of `rw` has then lost.

    Args:
        plan_of: makes a plan for a model, which narrows some of its groups.
        groups: those that may be narrowed. No branch goes that one of the others is wholly in.
        refit: whether layers will be refitted, and are to be before plans are compared.

    Raises:
        BudgetError: when neither meets the budget.
        CheckFailed: when the model without the branches does something else than the one that adds zeros.
    """
    return _Search(rw, coupling, groups, refit).best(plan_of)


class _Search:
    def __init__(self, rw: Rewriter, coupling: Coupling, groups: Sequence[Group], refit: bool) -> None:
        self.rw, self.coupling, self.groups, self.refit = rw, coupling, groups, refit
        names = {group.name for group in groups}
        self.left = [group for name, group in coupling.groups.items() if name not in names]
        self.error = OutputError(rw.model, rw.calib)
        if not 0 < self.error.size < math.inf:
            raise UsageError(
                "what branches are worth cannot be told: the outputs on the calibration data are zero or not finite",
                todo="calibrate with other data, or leave out branches=true",
            )

    def best(self, plan_of: Callable[[Coupling, Sequence[Group]], Plan]) -> tuple[Plan, list[Width]]:
        narrow = plan_of(self.coupling, self.groups)
        widths, refusal = _tried(narrow)
        losses = self._losses()
        gone = Tradeoff(narrow, losses).chosen()
        while gone and not any(True for _ in self._without(gone).parameters()):  # something has to be left
            gone.remove(max(gone, key=losses.__getitem__))
        self.rw.findings["branches"] = []
        if gone:
            shorter = couple(self._without(gone))
            short = plan_of(shorter, self._again(shorter))
            others, _ = _tried(short)
            if self._is_better((short, others), (narrow, widths)):
                self._erase(gone)
                self.rw.findings["branches"] = [_row(branch, losses[branch]) for branch in gone]
                return short, others or []
        if refusal is not None:
            raise refusal
        return narrow, widths or []

    def _losses(self) -> dict[Branch, float]:
        """What the outputs lose without each branch, the others being there."""
        found = {}
        stays = [{member.slot.user for member in group.members} for group in self.left]
        for branch in branches(self.rw.model):
            if any(users.issubset(branch.nodes) for users in stays):
                continue
            error = self.error.of(zeroed(self.rw.model, [branch]))
            if math.isfinite(error):
                found[branch] = error**2
            else:
                self.rw.skip(branch.add, f"branch '{branch.name}' stays: without it the outputs are not finite")
        return found

    def _without(self, gone: Sequence[Branch]) -> Model:
        copy = self.rw.model.clone(share_tensors=True)
        erase(Rewriter(copy), gone)
        return copy

    def _again(self, shorter: Coupling) -> list[Group]:
        """The groups of the model without branches that consist of nothing but what may be narrowed."""
        if not self.left:
            return list(shorter.groups.values())
        wanted = {place for group in self.groups for place in _places(group)}
        return [group for group in shorter.groups.values() if wanted.issuperset(_places(group))]

    def _is_better(self, short: _Tried, narrow: _Tried) -> bool:
        """Whether the outputs are no further away without the branches; a budget that only one meets, that one does."""
        errors = {"without branches": self._error(*short), "channels alone": self._error(*narrow)}
        self.rw.findings["plans"] = errors
        first, second = (math.inf if error is None else error for error in errors.values())
        return first <= second and first < math.inf

    def _error(self, plan: Plan, widths: list[Width] | None) -> float | None:
        """The error of a plan's model on the calibration data, refitted if that will be done and helps."""
        if widths is None:
            return None
        classes = classes_of(widths)
        small = cut_copy(plan.coupling, classes)
        error = self.error.of(small)
        if classes and self.refit:
            refit_layers(Removal(plan.coupling, classes), small, self.rw.calib)
            error = min(error, self.error.of(small))
        return error

    def _erase(self, gone: Sequence[Branch]) -> None:
        """Erase the branches of the model itself, and prove that nothing else has changed."""
        oracle = Oracle(zeroed(self.rw.model, gone), self.rw.calib[:1])
        erase(self.rw, gone)
        oracle.judge(self.rw.model, Contract.EXACT)


_Tried: TypeAlias = "tuple[Plan, list[Width] | None]"


def _tried(plan: Plan) -> tuple[list[Width] | None, GraphoptError | None]:
    try:
        return plan.widths(), None
    except (BudgetError, Conflict) as error:
        return None, error


def _places(group: Group) -> Iterator[tuple[str, int, int]]:
    """The places in stored tensors that a group is about."""
    for member in group.members:
        for unit in member.unit:
            yield from ((member.name, member.slot.axis, place) for place in np.flatnonzero(unit >= 0).tolist())


def _row(branch: Branch, loss: float) -> dict[str, Any]:
    return {"branch": branch.name, "add": branch.add.name, "layers": len(branch.layers), "loss": loss}
