"""Removal of the output positions that the user names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt.analysis.coupling import Coupling, Family, couple
from graphopt.errors import UsageError
from graphopt.names import nearest
from graphopt.passes._cutting import cut_and_prove
from graphopt.printer import module_path
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["RemoveChannels"]


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove named output positions of a layer, and all that has to go with them.

    What:
        The positions of `layer` (output channels of a convolution, features of a linear layer) go, with everything that
        is tied to them anywhere in the model. Where they do not make whole units (one channel of a head), the request
        is rounded up to the family of units that adds least; the report says what went.

    Algebra:
        With U the units of a family, what goes is the union of the units that hold a requested position.

    When it applies:
        Layers whose positions are not pinned: see `graphopt groups`. Refused: positions that the layer does not have,
        pinned ones, and requests that would leave nothing of some tensor.
        Options: `layer`, the module's path or the name of its weight; `indices`, separated by `;`; `refit`.

    Safety:
        Lossy. Proven on the spot, as `prune-channels` does it.

    Cost:
        A walk over the graph and three runs of the model.

    Source:
        Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> model = graphopt.capture(net, (torch.randn(1, 4),))
        >>> small, _ = graphopt.run(model, "remove-channels{layer=0,indices=1;5}")
        >>> list(small.params["2.weight"].shape)
        [2, 6]
    """

    name: ClassVar[str] = "remove-channels"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")

    layer: str
    indices: tuple[int, ...]
    refit: bool | None = None

    def run(self, rw: Rewriter) -> None:
        if self.refit and not rw.calib:
            raise UsageError("refit needs calibration data", todo="give some: calib= in Python, --calib DATA.npz")
        coupling = couple(rw.model)
        node = self._layer(coupling)
        wanted = self._classes(coupling, node)
        units = _fewest(coupling, wanted)
        if units is None:
            raise UsageError(f"these positions of '{self.layer}' are in no units that could go together")
        if emptied := _emptied(coupling, units):
            raise UsageError(f"nothing would be left of '{emptied[0].name}'", todo="name fewer positions")
        classes = sorted({c for unit in units for c in unit})
        refit = bool(rw.calib) if self.refit is None else self.refit
        cut_and_prove(rw, coupling, classes, f"{len(units)} units with positions of '{self.layer}' go", refit=refit)
        rw.findings |= self._report(coupling, node, classes, len(units))

    def _layer(self, coupling: Coupling) -> Node:
        named: dict[str, Node] = {}
        for node in coupling.trace.origins:
            named.setdefault(module_path(node) or node.name, node)
        for slot in coupling.trace.slots:
            if slot.role == "out" and slot.user in coupling.trace.origins:
                named.setdefault(str(slot.tensor.target), slot.user)
        if self.layer not in named:
            raise UsageError(f"no layer '{self.layer}' makes positions", todo=nearest(self.layer, named))
        return named[self.layer]

    def _classes(self, coupling: Coupling, node: Node) -> list[int]:
        labels = coupling.trace.origins[node].reshape(-1)
        outside = [index for index in self.indices if not -labels.numel() <= index < labels.numel()]
        if outside or not self.indices:
            what = f"has no position {outside[0]}" if outside else "is to lose no position"
            raise UsageError(f"'{self.layer}' {what}", todo=f"name some of its {labels.numel()} positions, from 0 on")
        found = coupling.of(labels).numpy()[list(self.indices)].tolist()
        if min(found) < 1:
            reasons = "; ".join(str(reason) for reason in coupling.classes.reasons(labels))
            raise UsageError(f"positions of '{self.layer}' have to stay", why=reasons or None)
        return sorted(set(found))

    def _report(self, coupling: Coupling, node: Node, removed: list[int], units: int) -> dict[str, Any]:
        classes = coupling.of(coupling.trace.origins[node].reshape(-1)).tolist()
        lost = set(removed)
        gone = [index for index, c in enumerate(classes) if c in lost]
        return {"asked": len(set(self.indices)), "removed": gone if len(gone) <= 1000 else gone[:1000], "units": units}


def _fewest(coupling: Coupling, wanted: list[int]) -> list[tuple[int, ...]] | None:
    """The units of one family of each group that hold all the classes, and as little else as can be."""
    found: list[tuple[int, ...]] = []
    left = set(wanted)
    for group in coupling.groups.values():
        mine = left.intersection(c for family in group.families for unit in family for c in unit)
        if not mine:
            continue
        ways = [units for family in group.families if (units := _holding(family, mine)) is not None]
        if not ways:
            return None
        found += min(ways, key=lambda units: (bool(_emptied(coupling, units)), sum(map(len, units))))
        left -= mine
    return None if left else found


def _emptied(coupling: Coupling, units: Iterable[tuple[int, ...]]) -> list[Node]:
    """Where nothing would be left without the units."""
    removed = np.zeros(coupling.classes.count, dtype=bool)
    removed[[c for unit in units for c in unit]] = True
    return [node for node, _ in coupling.rectangles.emptied(removed)]


def _holding(family: Family, classes: set[int]) -> list[tuple[int, ...]] | None:
    """The units that hold the classes; None where the family lacks one of them."""
    units = [unit for unit in family if classes.intersection(unit)]
    return units if classes <= {c for unit in units for c in unit} else None
