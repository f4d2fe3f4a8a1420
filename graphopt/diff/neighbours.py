"""Matching outwards from pairs: what fills the same slot, what is the only user of its kind, what lies between."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from graphopt.diff.align import Score, align
from graphopt.diff.hashing import edge_slot
from graphopt.diff.labels import Interner
from graphopt.diff.pairing import Pairing, alike
from graphopt.diff.reach import Support
from graphopt.diff.view import View, family

__all__ = ["align_between", "canonical_order", "spread"]

_SUPPORT = 16
"""What a common neighbour weighs beside equal operators, attributes and names."""

_CROWD = 16
"""A neighbour that more components than this share says nothing about which belong together."""


def spread(pairing: Pairing, labels_a: Sequence[int], labels_b: Sequence[int]) -> int:
    """From every pair on, pair operands in equal slots and users that are the only ones of their label and slot."""
    before = pairing.count
    work = deque(pairing.pairs())
    while work:
        i, j = work.popleft()
        for x, y in [*_operands(pairing, i, j), *_users(pairing, i, j, labels_a, labels_b)]:
            if pairing.free(x, y) and labels_a[x] == labels_b[y]:
                pairing.pair(x, y)
                work.append((x, y))
    return pairing.count - before


def _operands(pairing: Pairing, i: int, j: int) -> list[tuple[int, int]]:
    a, b = pairing.a, pairing.b
    if a.items[i].commutative:
        rows_a, rows_b = ([s for _, s in view.data_operands(index)] for view, index in ((a, i), (b, j)))
        left_a = [x for x in rows_a if pairing.mate_a[x] is None]
        left_b = [y for y in rows_b if pairing.mate_b[y] is None]
        if len(left_a) == len(left_b) == 1:
            return [(left_a[0], left_b[0])]
        return sorted(((x, y) for x in left_a for y in left_b), key=lambda pair: -alike(a, b, *pair))
    slots = dict(b.data_operands(j))
    return [(x, slots[slot]) for slot, x in a.data_operands(i) if slot in slots]


def _users(pairing: Pairing, i: int, j: int, labels_a: Sequence[int], labels_b: Sequence[int]) -> list[tuple[int, int]]:
    found = []
    sides = []
    for view, index, labels, mate in (
        (pairing.a, i, labels_a, pairing.mate_a),
        (pairing.b, j, labels_b, pairing.mate_b),
    ):
        rows: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        for slot, user in view.users[index]:
            if mate[user] is None:
                rows[labels[user], edge_slot(view, user, slot)].append(user)
        sides.append(rows)
    for key, users_a in sides[0].items():
        users_b = sides[1].get(key, [])
        if len(users_a) == len(users_b) == 1:
            found.append((users_a[0], users_b[0]))
    return found


def align_between(pairing: Pairing, structure: tuple[Sequence[int], Sequence[int]], intern: Interner) -> int:
    """Align what is left between equal neighbours: connected unmatched calls of `a` with those of `b`, in order."""
    before = pairing.count
    parts_a = _components(pairing.a, pairing.mate_a)
    parts_b = _components(pairing.b, pairing.mate_b)
    families = [[intern(("family", family(item.operator))) for item in view.items] for view in (pairing.a, pairing.b)]
    keys = [
        _keys(pairing, structure, intern),
        (structure[0], structure[1]),
        (families[0], families[1]),
    ]

    support = Support(pairing)

    def score(i: int, j: int) -> int:
        if families[0][i] != families[1][j]:
            return 0
        return 1 + _SUPPORT * support(i, j) + alike(pairing.a, pairing.b, i, j)

    for part_a, part_b in _together(pairing, parts_a, parts_b):
        _align(pairing, part_a, part_b, score, keys)
    return pairing.count - before


def _align(
    pairing: Pairing,
    part_a: list[int],
    part_b: list[int],
    score: Score,
    keys: list[tuple[Sequence[int], Sequence[int]]],
) -> None:
    for i, j in align(part_a, part_b, score, keys):
        if pairing.free(i, j):
            pairing.pair(i, j)


def _keys(
    pairing: Pairing, structure: tuple[Sequence[int], Sequence[int]], intern: Interner
) -> tuple[list[int], list[int]]:
    """Labels with module paths and names of tensors."""
    return tuple(  # type: ignore[return-value]  # two lists
        [
            intern((labels[item.index], item.path, tuple(row.tensor for row in view.tensors(item.index).values())))
            for item in view.items
        ]
        for view, labels in zip((pairing.a, pairing.b), structure, strict=True)
    )


def _components(view: View, mate: Sequence[int | None]) -> list[list[int]]:
    """Unmatched calls that hang together, each component in the canonical order of its items."""
    owner: dict[int, int] = {}
    for item in view.calls():
        if mate[item.index] is not None or item.index in owner:
            continue
        stack, owner[item.index] = [item.index], item.index
        while stack:
            index = stack.pop()
            near = [source for _, source in view.items[index].operands] + [user for _, user in view.users[index]]
            for other in near:
                if other not in owner and mate[other] is None and view.items[other].kind == "call":
                    owner[other] = item.index
                    stack.append(other)
    found: defaultdict[int, list[int]] = defaultdict(list)
    if owner:
        for index in canonical_order(view):
            if index in owner:
                found[owner[index]].append(index)
    return list(found.values())


def _together(
    pairing: Pairing, parts_a: list[list[int]], parts_b: list[list[int]]
) -> list[tuple[list[int], list[int]]]:
    """Components that share the most matched neighbours, one of either side each."""
    edges_a = [_edges(pairing.a, part, pairing.number_a) for part in parts_a]
    edges_b = [_edges(pairing.b, part, pairing.number_b) for part in parts_b]
    homes: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for number, edges in enumerate(edges_b):
        for edge in edges:
            homes[edge].append(number)
    shared = []
    for number, edges in enumerate(edges_a):
        votes = Counter(other for edge in edges if len(homes[edge]) <= _CROWD for other in homes[edge])
        shared += [(-count, number, other) for other, count in votes.items()]
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    found = []
    for _, x, y in sorted(shared):
        if x not in taken_a and y not in taken_b:
            taken_a.add(x)
            taken_b.add(y)
            found.append((parts_a[x], parts_b[y]))
    return found


def _edges(view: View, part: list[int], numbers: Sequence[int | None]) -> set[tuple[str, int]]:
    """The matched neighbours of a component, and on which side of it they lie."""
    found = set()
    for index in part:
        for _, source in view.data_operands(index):
            if (number := numbers[source]) is not None:
                found.add(("above", number))
        for _, user in view.users[index]:
            if (number := numbers[user]) is not None:
                found.add(("below", number))
    return found


def canonical_order(view: View) -> list[int]:
    """A topological order that depends on structure alone: operands before users, depth first from the outputs."""
    seen = [False] * len(view.items)
    order: list[int] = []
    unused = (item.index for item in view.items if item.kind != "output" and not view.users[item.index])
    for root in (view.output, *unused):
        stack = [(root, False)]
        while stack:
            index, done = stack.pop()
            if done:
                order.append(index)
            elif not seen[index]:
                seen[index] = True
                stack.append((index, True))
                stack += [(source, False) for _, source in reversed(view.items[index].operands) if not seen[source]]
    return order
