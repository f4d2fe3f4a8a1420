"""Removal of units that training has brought to zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from graphopt.analysis.coupling import Coupling, couple
from graphopt.analysis.removal import Conflict, Removal
from graphopt.check import Oracle
from graphopt.errors import CheckFailed
from graphopt.passes._cutting import cut_copy
from graphopt.rewriter import Rewriter
from graphopt.sample import sample_inputs
from graphopt.surgery import cut
from graphopt.train.units import Units
from graphopt.transform import Contract, Pass

__all__ = ["RemoveZeros"]

Found: TypeAlias = dict[str, list[tuple[int, ...]]]
"""For groups by name some of their units, as classes."""


@dataclass(frozen=True)
class RemoveZeros(Pass):
    """Remove units whose weights are all zero, where nothing reads anything of them.

    What:
        Optimizers of `graphopt.train` leave channels, heads and features of which every weight that makes them is zero:
        rows of the layers, biases, scale and shift of norms. They go, with all that reads them, and the model computes
        what it did.

    Algebra:
        y = W1 f(W0 x + b0) with W0 [hidden, in], W1 [out, hidden]: where row i of W0 and b0 are zero, the unit is the
        constant f(0), and W1[:, i] f(0) is zero if f(0) is.

    When it applies:
        Units of the groups that `graphopt groups` lists, of the family of which most is zero; where all of some tensor
        would go, one unit stays. A group is left alone, with the reason, where the model without its zero units
        computes something else: zero may not be what readers see (sigmoid(0) = 0.5), or zeros may count in a mean, a
        softmax or the statistics of a norm.

    Safety:
        Exact. The cut model is compared with the original, in which nothing is masked, on calibration data or, without,
        on two samples; groups for which they do not agree stay.

    Cost:
        A walk over the graph, one cut and a few runs of the model; some more of them where groups have to stay.

    Source:
        Chen et al., Only Train Once, NeurIPS 2021, section 3.1 (zero-invariant groups).

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:5].zero_(), net[0].bias[2:5].zero_()
        >>> model = graphopt.capture(net, (torch.randn(1, 4),))
        >>> small, _ = graphopt.run(model, "remove-zeros")
        >>> list(small.params["2.weight"].shape)
        [2, 5]
    """

    name: ClassVar[str] = "remove-zeros"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        coupling = couple(rw.model)
        found = zero_units(coupling)
        search = _Search(rw, coupling, found)
        search.look(list(found))
        if search.sound:
            count = sum(len(found[name]) for name in search.sound)
            cut(rw, Removal(coupling, _classes(found, search.sound)), f"{count} units are zero")
        rw.findings["removed"] = {name: len(found[name]) for name in search.sound}


class _Search:
    """Finds the groups that can lose their zero units: all at once, and by halves where that fails."""

    def __init__(self, rw: Rewriter, coupling: Coupling, found: Found) -> None:
        self.rw, self.coupling, self.found = rw, coupling, found
        self.sound: list[str] = []
        original = rw.model.clone(share_tensors=True).eval()
        self.inputs = [list(batch) for batch in rw.calib] or [sample_inputs(rw.model, seed=seed) for seed in (0, 1)]
        self.oracle = Oracle(original, self.inputs) if found else None

    def look(self, names: list[str]) -> None:
        """Take of these groups all that can go along with what is sound already."""
        why = self._refusal([*self.sound, *names]) if names else None
        if why is None:
            self.sound += names
        elif len(names) > 1:
            self.look(names[: len(names) // 2])
            self.look(names[len(names) // 2 :])
        else:
            node = self.coupling.group(names[0]).members[0].slot.user
            self.rw.skip(node, f"the {len(self.found[names[0]])} zero units of group '{names[0]}' stay: {why}")

    def _refusal(self, names: list[str]) -> str | None:
        """Why the zero units of these groups cannot go; None when they can."""
        assert self.oracle is not None
        try:
            self.oracle.judge(cut_copy(self.coupling, _classes(self.found, names)).eval(), Contract.EXACT)
        except CheckFailed as error:
            return f"what reads them does not see zero, {error.what}"
        except Conflict as error:
            return error.what
        return None


def zero_units(coupling: Coupling) -> Found:
    """For each group that has some, the units of one family whose weights are all zero."""
    if any(tensor.is_meta for tensor in coupling.model.params.values()):
        return {}
    best: Found = {}
    for family in range(max((len(group.families) for group in coupling.groups.values()), default=0)):
        groups = [group for group in coupling.groups.values() if family < len(group.families)]
        units = Units(coupling, groups, families={group.name: family for group in groups})
        empty = (units.nonzeros() == 0) & (units.sizes > 0)
        for group, span in zip(groups, units.spans, strict=True):
            numbers = empty[span.start : span.stop].nonzero().flatten().tolist()
            found = [group.families[family][number] for number in numbers]
            if sum(map(len, found)) > sum(map(len, best.get(group.name, []))):
                best[group.name] = found
    return _without_gaps(coupling, best)


def _without_gaps(coupling: Coupling, found: Found) -> Found:
    """Units that leave something of every tensor: where all is zero, the first of them stays."""
    removed = np.zeros(coupling.classes.count, dtype=bool)
    removed[_classes(found, found)] = True
    while emptied := coupling.rectangles.emptied(removed):
        classes = set(emptied[0][1].tolist())
        holding = ((name, unit) for name, units in found.items() for unit in units if classes.intersection(unit))
        name, kept = next(holding)
        removed[list(kept)] = False
        found = found | {name: [unit for unit in found[name] if unit is not kept]}
    return {name: units for name, units in found.items() if units}


def _classes(found: Found, names: Iterable[str]) -> list[int]:
    return sorted({c for name in names for unit in found[name] for c in unit})
