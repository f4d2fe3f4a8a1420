"""What the outputs lose when a part of one group goes alone: each group, each family of its units, each fraction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from graphopt.analysis.cost import cost
from graphopt.analysis.coupling import Coupling, Group, couple
from graphopt.analysis.removal import Conflict, Removal
from graphopt.analysis.widths import layer_macs
from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.names import nearest
from graphopt.passes._cutting import cut_copy
from graphopt.passes._importance import MEASURES, measure
from graphopt.passes._output_error import OutputError
from graphopt.passes._plan import Width, without_gaps
from graphopt.passes._refit import refit
from graphopt.sample import check_batch

__all__ = ["FRACTIONS", "Row", "check_options", "sensitivity"]

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)

Batches = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Row:
    """What is lost with some units of one group.

    Attributes:
        family: the place of the units' family among those of the group.
        units: how many the family has.
        fraction: the part of them that was asked to go; `removed` is the number that it is rounded to. At least one
            unit stays, and something of every tensor.
        error: root of the mean square of the outputs' differences, relative to the outputs; None where it is not known.
        refitted: the same when the layers that read the units are refitted; None without refitting.
        macs, parameters: the part of the model's that is left.
        reason: why the error is not known.
    """

    group: str
    family: int
    units: int
    fraction: float
    removed: int
    error: float | None = None
    refitted: float | None = None
    macs: float | None = None
    parameters: float | None = None
    reason: str | None = None

    @property
    def label(self) -> str:
        """The group, and from the second on the number of the family."""
        return f"{self.group} | {self.family + 1}" if self.family else self.group


def sensitivity(
    model: Model,
    batches: Batches,
    *,
    importance: str = "taylor",
    fractions: Iterable[float] = FRACTIONS,
    refit: bool = True,
    only: Sequence[str] = (),
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Remove of every group the least important units alone, and see what the outputs lose on calibration data.

    Args:
        batches: flat tensor inputs, as for `calib` of `graphopt.run`.
        importance: the measure that sorts the units, as for `prune-channels`.
        refit: whether to see also what is lost when the layers that read the units are refitted.
        only: names of groups; all by default.
        tell: is told how far the work is.

    Returns:
        Rows in the order of the graph, then of families, then of fractions. The model stays as it is.

    Raises:
        UsageError: for an unknown group or measure, a fraction that is none, or data that do not fit the model.
    """
    wanted = check_options(fractions, importance)
    _check(model, batches)
    original = model.clone(share_tensors=True).eval()
    coupling = couple(original)
    chosen = {coupling.group(name).name for name in only} or coupling.groups.keys()
    groups = [group for name, group in coupling.groups.items() if name in chosen]
    if not groups:
        return []
    tell(f"importance of units by {importance}")
    scores = measure(importance, coupling, batches, seed)
    alone = _Alone(coupling, batches, refit=refit)
    pairs = [(group, family) for group in groups for family in range(len(group.families))]
    rows: list[Row] = []
    for count, (group, family) in enumerate(pairs):
        order = np.argsort(scores.scores(group, family), kind="stable").tolist()
        for place, fraction in enumerate(wanted):
            tell(f"removing units: {count * len(wanted) + place + 1} of {len(pairs) * len(wanted)}, {group.name}")
            rows.append(alone.row(group, family, order, fraction))
    return rows


def check_options(fractions: Iterable[float], importance: str) -> list[float]:
    """The fractions in order, each once.

    Raises:
        UsageError: for a fraction that is not between 0 and 1, none at all, or an unknown measure.
    """
    found = sorted(set(fractions))
    wrong = [f"{fraction:g}" for fraction in found if not 0 < fraction < 1]
    if wrong or not found:
        raise UsageError(
            f"{', '.join(wrong)}: a fraction is more than 0 and less than 1" if wrong else "there are no fractions",
            todo="give the parts of a group to remove, such as 0.25,0.5",
        )
    if importance not in MEASURES:
        raise UsageError(f"there is no importance '{importance}'", todo=nearest(importance, MEASURES))
    return found


def _check(model: Model, batches: Batches) -> None:
    if not batches:
        raise UsageError("sensitivity needs calibration data", todo="give at least one batch of inputs")
    for number, batch in enumerate(batches):
        check_batch(model.signature, batch, f"calibration batch {number}")
    if not any(getattr(torch, spec.dtype).is_floating_point for spec in model.signature.tensor_outputs):
        raise UsageError(
            "no output has floating point, so that no error can be told",
            todo="give the model that makes the scores, without what chooses among them",
        )


class _Alone:
    """A model that loses one width at a time, and what it computes with none lost."""

    def __init__(self, coupling: Coupling, batches: Batches, *, refit: bool) -> None:
        self.coupling, self.batches, self.refit = coupling, batches, refit
        self.macs, self.parameters = _costs(coupling.model)
        self.error = OutputError(coupling.model, batches)
        if not 0 < self.error.size < math.inf:
            found = "all zero" if self.error.size == 0 else "not finite"
            raise UsageError(f"the outputs on the calibration data are {found}", todo="calibrate with other data")
        self._known: dict[tuple[str, int, int], Row] = {}

    def row(self, group: Group, family: int, order: list[int], fraction: float) -> Row:
        """What is lost with a fraction of the units in `order`. Fractions that round to as many units share a cut."""
        size = len(order)
        removed = size - max(1, round(size * (1 - fraction)))
        (width,) = without_gaps(self.coupling, [Width(group, family, tuple(order[:removed]))])
        key = group.name, family, len(width.units)
        if key not in self._known:
            self._known[key] = self._measured(width, Row(group.name, family, size, fraction, len(width.units)))
        return replace(self._known[key], fraction=fraction)

    def _measured(self, width: Width, row: Row) -> Row:
        if not width.units:
            return replace(row, error=0.0, refitted=0.0 if self.refit else None, macs=1.0, parameters=1.0)
        try:
            small = cut_copy(self.coupling, width.classes)
            better = small.clone(share_tensors=True)
            if self.refit:
                refit(Removal(self.coupling, width.classes), better, self.batches)
        except Conflict as conflict:
            return replace(row, reason=f"{conflict.what}, at {conflict.where}")
        macs, parameters = _costs(small)
        error = _finite(self.error.of(small))
        again = _finite(self.error.of(better)) if self.refit else None
        finite = error is not None and (again is not None or not self.refit)
        return replace(
            row,
            error=error,
            refitted=again,
            macs=macs / self.macs if self.macs else 1.0,
            parameters=parameters / self.parameters if self.parameters else 1.0,
            reason=None if finite else "the outputs are not finite",
        )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _costs(model: Model) -> tuple[float, float]:
    return sum(layer_macs(model).values()), float(cost(model).parameters)
