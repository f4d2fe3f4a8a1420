"""Hashes of what lies above and below every node, ending at nodes that are matched already."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.diff.labels import Interner
from graphopt.diff.view import View

__all__ = ["down_hashes", "edge_slot", "up_hashes"]


def edge_slot(view: View, user: int, slot: str) -> str:
    """The slot of an operand as far as its place matters: the two operands of a commutative call have one."""
    return "" if view.items[user].commutative else slot


def up_hashes(view: View, labels: Sequence[int], partner: Sequence[int | None], intern: Interner) -> list[int]:
    """A number for what each item computes: its label, and its operands' numbers. A matched item stands for itself.

    Args:
        partner: for every item the number of its pair, None where it has none.
    """
    found: list[int] = []
    for item in view.items:
        number = partner[item.index]
        if number is not None:
            found.append(-1 - number)  # below all that the interner gives
            continue
        if item.kind == "tensor":
            found.append(0)
            continue
        operands = [
            (edge_slot(view, item.index, slot), found[source]) for slot, source in view.data_operands(item.index)
        ]
        if item.commutative:
            operands.sort()
        found.append(intern(("up", labels[item.index], tuple(operands))))
    return found


def down_hashes(view: View, labels: Sequence[int], partner: Sequence[int | None], intern: Interner) -> list[int]:
    """A number for what becomes of each item: its label, and its users' numbers. A matched item stands for itself."""
    found = [0] * len(view.items)
    for item in reversed(view.items):
        number = partner[item.index]
        if number is not None:
            found[item.index] = -1 - number
            continue
        if item.kind == "tensor":
            continue
        users = sorted((edge_slot(view, user, slot), found[user]) for slot, user in view.users[item.index])
        found[item.index] = intern(("down", labels[item.index], tuple(users)))
    return found
