"""What the passes that expand widths have in common: which groups, how much, and the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.analysis.coupling import Coupling, couple
from graphopt.analysis.removal import Conflict
from graphopt.check import Oracle
from graphopt.errors import UsageError
from graphopt.passes._expansion import Draw, Growth, Init, expand, fresh
from graphopt.passes._expansion_rules import silence, why_inexact
from graphopt.passes._expansion_sites import Part, Site, attention_calls, chosen, sites
from graphopt.printer import module_path
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["Widening", "amount", "widen"]


_PLURAL = {"heads": "heads", "head-size": "features of values", "attention": "features of queries and keys"}


def amount(by: int | None, to: int | None) -> None:
    """Look at the options that say how much.

    Raises:
        UsageError: unless one of them is given, and it is positive.
    """
    given = {name: value for name, value in (("by", by), ("to", to)) if value is not None}
    if len(given) != 1:
        raise UsageError("it needs to know how much", todo="give by=1, how many more, or to=8, how many in the end")
    ((name, value),) = given.items()
    if value < 1:
        raise UsageError(f"{name} is {value}, it has to be at least 1")


@dataclass(frozen=True)
class Widening(Pass):
    """Base of the passes that add units of one kind to groups; `part` says of which."""

    part: ClassVar[Part]
    contract: ClassVar[Contract] = Contract.EXACT

    by: int | None = None
    to: int | None = None
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    init: Init = "normal"
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        amount(self.by, self.to)
        widen(rw, self.part, self._times, self.only, self.leave, Draw(self.init, self.seed))

    def _times(self, site: Site) -> int:
        """How many units are added, less than one where there are enough."""
        return self.by if self.by is not None else (self.to or 0) - site.size


def widen(
    rw: Rewriter,
    part: Part,
    times: Callable[[Site], int],
    only: tuple[str, ...],
    leave: tuple[str, ...],
    draw: Draw,
) -> None:
    """Expand all chosen groups, one after the other; those that cannot be are skipped with the reason.

    Args:
        times: how often the unit of a site is copied.

    Raises:
        UsageError: when `only` or `leave` name nothing.
        CheckFailed: when the model computes something else afterwards.
    """
    original = rw.model.clone(share_tensors=True).eval()
    coupling, rows = couple(rw.model), []
    _report_pinned(rw, coupling)
    found = list(sites(coupling, part))
    for node in attention_calls(coupling) if not found and part in ("heads", "head-size", "attention") else ():
        rw.skip(node, f"its {_PLURAL[part]} stay: they are one only, or tied to others that stay")
    for name in chosen(found, only, leave):
        if rw.exhausted:
            break
        site, edits = sites(coupling, part)[name], len(rw.edits)
        try:
            rows.append(_expanded(rw, coupling, site, times(site), draw, copied=part == "hidden"))
            coupling = couple(rw.model)
        except Conflict as conflict:
            if len(rw.edits) > edits:
                raise
            where = f" at {conflict.where}" if conflict.where else ""
            rw.skip(coupling.group(name).members[0].slot.user, f"'{name}' stays: {conflict.what}{where}")
    rw.findings["groups"] = rows
    if rows:
        Oracle(original, rw.calib[:1]).judge(rw.model.clone(share_tensors=True).eval(), Contract.EXACT)


def _expanded(rw: Rewriter, coupling: Coupling, site: Site, times: int, draw: Draw, *, copied: bool) -> dict[str, Any]:
    """Expand one group, and say what came of it.

    Raises:
        Conflict: when it has to stay; nothing is edited then.
    """
    if times < 1:
        raise Conflict(f"it has {site.size} already")
    growth = Growth(coupling, site.unit, times)
    why = why_inexact(growth, copied=copied)
    if why is not None:
        raise Conflict(why)
    quiet = silence(growth)
    if copied and quiet:
        raise Conflict("queries meet keys along it, of which new ones would have to be zero and copies at once")
    new = dict(_new(growth))
    more = times * site.each
    expand(rw, growth, quiet, draw, f"'{site.name}' had {site.size} and has {more} more")
    return {"group": site.name, "from": site.size, "to": site.size + more, "new": new}


def _new(growth: Growth) -> Iterator[tuple[str, list[int]]]:
    """By the names of layers the positions that are new: those that `remove-channels` takes back."""
    for node, labels in growth.coupling.trace.origins.items():
        positions = growth.kept(labels.reshape(-1), node)[0]
        if positions is not None:
            yield module_path(node) or node.name, fresh(positions).nonzero().flatten().tolist()


def _report_pinned(rw: Rewriter, coupling: Coupling) -> None:
    named = {pinned.name: pinned for pinned in coupling.pinned}
    for node in coupling.trace.origins:
        pinned = named.get(module_path(node) or node.name)
        if pinned is not None:
            rw.skip(node, f"its {pinned.size} positions stay: {'; '.join(pinned.reasons) or 'nothing reads them'}")
