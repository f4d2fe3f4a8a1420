"""Matching of whole classes of equal nodes: what is equal upwards from the inputs, or downwards to the outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from graphopt.diff.hashing import down_hashes, edge_slot, up_hashes
from graphopt.diff.labels import Interner
from graphopt.diff.pairing import Pairing, alike
from graphopt.diff.reach import Support
from graphopt.diff.view import View

__all__ = ["sweep"]

_Classes = dict[int, tuple[list[int], list[int]]]


def sweep(pairing: Pairing, labels_a: Sequence[int], labels_b: Sequence[int], intern: Interner, *, strict: bool) -> int:
    """Pair what has equal labels and equal surroundings above, then below; returns how many pairs are new.

    Args:
        strict: leave what is ambiguous for later, when more of its surroundings is matched; otherwise paths, names
            and order decide.
    """
    before = pairing.count
    for upwards in (True, False):
        a, b = pairing.a, pairing.b
        if not pairing.free_calls_a() or not pairing.free_calls_b():
            break
        up = up_hashes(a, labels_a, pairing.number_a, intern), up_hashes(b, labels_b, pairing.number_b, intern)
        down = down_hashes(a, labels_a, pairing.number_a, intern), down_hashes(b, labels_b, pairing.number_b, intern)
        keys, others = (up, down) if upwards else (down, up)
        near = _operands if upwards else _users
        for members_a, members_b in _classes(pairing, keys, reverse=not upwards).values():
            if members_a and members_b:
                _match_class(pairing, members_a, members_b, others, near, strict=strict)
    return pairing.count - before


def _classes(pairing: Pairing, keys: tuple[list[int], list[int]], *, reverse: bool) -> _Classes:
    """Unmatched calls by key, in an order in which a class comes after those that its members read (or are read by)."""
    found: _Classes = {}
    calls = pairing.free_calls_a()
    for item in reversed(calls) if reverse else calls:
        found.setdefault(keys[0][item.index], ([], []))[0].append(item.index)
    for item in pairing.free_calls_b():
        if (entry := found.get(keys[1][item.index])) is not None:
            entry[1].append(item.index)
    return found


def _operands(view: View, numbers: Sequence[int | None], index: int) -> Hashable:
    found = [(edge_slot(view, index, slot), _number(numbers, source)) for slot, source in view.data_operands(index)]
    return tuple(sorted(found) if view.items[index].commutative else found)


def _users(view: View, numbers: Sequence[int | None], index: int) -> Hashable:
    return tuple(sorted((edge_slot(view, user, slot), _number(numbers, user)) for slot, user in view.users[index]))


def _number(numbers: Sequence[int | None], index: int) -> int:
    number = numbers[index]
    return -1 if number is None else number


def _match_class(
    pairing: Pairing,
    members_a: list[int],
    members_b: list[int],
    others: tuple[list[int], list[int]],
    near: Callable[[View, Sequence[int | None], int], Hashable],
    *,
    strict: bool,
) -> None:
    """Pair the members of one class: first by neighbours that are matched, then by what lies on the other side."""
    if len(members_a) == len(members_b) == 1:
        pairing.pair(members_a[0], members_b[0])
        return
    groups = _grouped(
        ((near(pairing.a, pairing.number_a, i), i) for i in members_a),
        ((near(pairing.b, pairing.number_b, j), j) for j in members_b),
    )
    for group_a, group_b in groups:
        for rest_a, rest_b in _grouped(((others[0][i], i) for i in group_a), ((others[1][j], j) for j in group_b)):
            if len(rest_a) == len(rest_b):  # twins: any choice is right, paths and names make the expected one
                _by_likeness(pairing, rest_a, rest_b)
        left_a = [i for i in group_a if pairing.mate_a[i] is None]
        left_b = [j for j in group_b if pairing.mate_b[j] is None]
        if left_a and left_b and (not strict or len(left_a) == len(left_b) == 1):
            _by_likeness(pairing, left_a, left_b)


def _grouped(
    rows_a: Iterable[tuple[Hashable, int]], rows_b: Iterable[tuple[Hashable, int]]
) -> list[tuple[list[int], list[int]]]:
    found: defaultdict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for key, i in rows_a:
        found[key][0].append(i)
    for key, j in rows_b:
        if key in found:
            found[key][1].append(j)
    return [group for group in found.values() if group[1]]


_MANY = 64
"""Groups of more twins than this are paired by path and name through a table, not all against all."""


def _by_likeness(pairing: Pairing, group_a: list[int], group_b: list[int]) -> None:
    """Pair as many as there are, the most alike first, then in order."""
    a, b = pairing.a, pairing.b
    if len(group_a) == len(group_b) == 1:
        pairing.pair(group_a[0], group_b[0])
        return
    if max(len(group_a), len(group_b)) <= _MANY:
        support = Support(pairing)
        scored = sorted((-support(i, j), -alike(a, b, i, j), i, j) for i in group_a for j in group_b)
        for *_, i, j in scored:
            if pairing.free(i, j):
                pairing.pair(i, j)
        return
    for key in (lambda item: (item.path, item.name), lambda item: item.path, lambda item: None):
        left_a = [(key(a.items[i]), i) for i in group_a if pairing.mate_a[i] is None]
        left_b = [(key(b.items[j]), j) for j in group_b if pairing.mate_b[j] is None]
        for same_a, same_b in _grouped(left_a, left_b):
            for i, j in zip(same_a, same_b, strict=False):
                pairing.pair(i, j)
