"""Walking over a graph until nothing changes, with the reasons for what is left when it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from graphopt.rewriter import Node, Rewriter

__all__ = ["DEARER", "Note", "walk_until_still"]

Note: TypeAlias = Callable[[Node, str], None]
"""Takes down why a node is left alone."""
DEARER = "is exact, but takes"
"""Part of every reason that something exact does not pay."""


def walk_until_still(rw: Rewriter, walk: Callable[[Note], None]) -> None:
    """Call `walk` until it makes no edit, or the limit on edits is reached.

    Only the reasons of the last walk are reported: those before it may be about what has been merged since. How many of
    them are about costs is a finding.
    """
    reasons: dict[tuple[Node, str], None] = {}

    def note(node: Node, why: str) -> None:
        reasons[node, why] = None

    edits = -1
    while edits < len(rw.edits) and not rw.exhausted:
        edits = len(rw.edits)
        reasons.clear()
        walk(note)
    for node, why in reasons:
        rw.skip(node, why)
    dearer = sum(DEARER in why for _, why in reasons)
    if dearer:
        rw.findings["exact but dearer"] = dearer
