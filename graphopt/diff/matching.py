"""Which node of one graph is which of the other. Names break ties and decide nothing else.

The steps, from what is certain to what is likely, each near-linear in the size of the graphs:

1. inputs by position (by name where their numbers differ), outputs;
2. equal hashes of everything above or everything below, with the contents of weights;
3. the only readers of equal weights, wherever they are;
4. the same hashes without weights and sizes, where matched nodes stand for themselves;
5. outwards from pairs: equal slots, only users of their kind;
6. what is left between equal neighbours, aligned in topological order;
7. the hashes again, where now names may choose among twins;
8. pairs that nothing around them supports are parted again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator

from graphopt.diff.labels import LEVELS, Fingerprint, Interner, Level, fingerprint, labels_of
from graphopt.diff.neighbours import align_between, spread
from graphopt.diff.pairing import Pairing
from graphopt.diff.reach import Support
from graphopt.diff.sweeps import sweep
from graphopt.diff.view import Item, View, family

__all__ = ["Marks", "marks_of", "match_views"]

Marks = dict[int, Fingerprint]

_ROUNDS = 3


def marks_of(view: View) -> Marks:
    """Fingerprints of the tensors, by item."""
    params = view.model.params
    return {item.index: fingerprint(params[item.tensor]) for item in view.items if item.kind == "tensor"}


def match_views(a: View, b: View, marks: tuple[Marks, Marks]) -> Pairing:
    """Pair inputs, calls and outputs of two views; tensors are left to the calls that read them."""
    pairing = Pairing(a, b)
    intern = Interner()
    levels: dict[Level, tuple[list[int], list[int]]] = {
        level: (labels_of(a, level, marks[0], intern), labels_of(b, level, marks[1], intern)) for level in LEVELS
    }
    _match_ends(pairing)
    sweep(pairing, *levels["full"], intern, strict=True)
    _anchor(pairing, _contents(a, marks[0]), _contents(b, marks[1]))
    for _ in range(_ROUNDS):
        found = sweep(pairing, *levels["structure"], intern, strict=True)
        if not found or not pairing.free_calls_a() or not pairing.free_calls_b():
            break
    if pairing.free_calls_a() and pairing.free_calls_b():
        _match_rest(pairing, levels, intern)
    _part_unsupported(pairing, marks)
    return pairing


def _match_rest(pairing: Pairing, levels: dict[Level, tuple[list[int], list[int]]], intern: Interner) -> None:
    spread(pairing, *levels["structure"])
    spread(pairing, *levels["operator"])
    _anchor(pairing, _names(pairing.a), _names(pairing.b))
    spread(pairing, *levels["operator"])
    align_between(pairing, levels["structure"], intern)
    for level in LEVELS[1:]:
        sweep(pairing, *levels[level], intern, strict=False)
        spread(pairing, *levels[level])
    align_between(pairing, levels["structure"], intern)


def _match_ends(pairing: Pairing) -> None:
    a, b = pairing.a, pairing.b
    pairing.pair(a.output, b.output)
    inputs_a, inputs_b = a.inputs(), b.inputs()
    if len(inputs_a) != len(inputs_b):
        named = {item.name: item.index for item in inputs_b}
        for item in inputs_a:
            if item.name in named:
                pairing.pair(item.index, named[item.name])
    # In order, each with the next of its shape, so that one that was put in between shifts nothing.
    for same in (True, False):
        left_a = [item for item in inputs_a if pairing.mate_a[item.index] is None]
        left_b = [item for item in inputs_b if pairing.mate_b[item.index] is None]
        if len(inputs_a) == len(inputs_b):
            for x, y in zip(left_a, left_b, strict=True):
                pairing.pair(x.index, y.index)
            return
        for item in left_a:
            near = [other for other in left_b if not same or other.shape == item.shape]
            if near:
                left_b.remove(near[0])
                pairing.pair(item.index, near[0].index)


def _contents(view: View, marks: Marks) -> Iterator[tuple[Hashable, int]]:
    """Every call that reads telling weights, under all of them together and under each."""
    for item in view.calls():
        digests = [
            (family(item.operator), marks[row.index].digest)
            for row in _stored(view, item)
            if not marks[row.index].plain
        ]
        if len(digests) > 1:
            yield (tuple(digests), item.index)
        for digest in digests:
            yield (digest, item.index)


def _stored(view: View, item: Item) -> Iterator[Item]:
    """The tensors that a call reads, also where it reads one transposed, as exporters write it."""
    for _, source in item.operands:
        row = view.items[source]
        if family(row.operator) == "transposition" and len(row.operands) == 1:
            row = view.items[row.operands[0][1]]
        if row.kind == "tensor":
            yield row


def _names(view: View) -> Iterator[tuple[Hashable, int]]:
    """Every call that reads tensors, under its form and their names."""
    for item in view.calls():
        names = tuple((slot, row.tensor) for slot, row in view.tensors(item.index).items())
        if names:
            yield ((family(item.operator), names), item.index)
            yield ((family(item.operator), names[0]), item.index)


def _anchor(pairing: Pairing, keys_a: Iterator[tuple[Hashable, int]], keys_b: Iterator[tuple[Hashable, int]]) -> None:
    """Pair unmatched calls that are the only ones under a key on either side."""
    found: list[defaultdict[Hashable, list[int]]] = [defaultdict(list), defaultdict(list)]
    for rows, keys, mate in ((found[0], keys_a, pairing.mate_a), (found[1], keys_b, pairing.mate_b)):
        for key, index in keys:
            if mate[index] is None:
                rows[key].append(index)
    votes: Counter[tuple[int, int]] = Counter()
    for key, rows_a in found[0].items():
        rows_b = found[1].get(key, [])
        if len(rows_a) == len(rows_b) == 1:
            votes[rows_a[0], rows_b[0]] += 1
    for (i, j), _ in sorted(votes.items(), key=lambda vote: (-vote[1], vote[0])):
        if pairing.free(i, j):
            pairing.pair(i, j)


def _part_unsupported(pairing: Pairing, marks: tuple[Marks, Marks]) -> None:
    """Part pairs without a common neighbour, unless they read the same telling weights: those have moved."""
    work = True
    while work:
        work = False
        for i, j in list(pairing.pairs()):
            if pairing.a.items[i].kind != "call" or _supported(pairing, i, j) or _same_content(pairing, marks, i, j):
                continue
            pairing.part(i)
            work = True


def _supported(pairing: Pairing, i: int, j: int) -> bool:
    """Whether a matched neighbour above or below is the same on both sides, unmatched nodes between them skipped."""
    if Support(pairing)(i, j):
        return True
    # Calls that read and feed nothing stand nowhere.
    ends = any(True for _ in pairing.a.data_operands(i)) or any(True for _ in pairing.b.data_operands(j))
    return not ends and not pairing.a.users[i] and not pairing.b.users[j]


def _same_content(pairing: Pairing, marks: tuple[Marks, Marks], i: int, j: int) -> bool:
    digests = [
        {view_marks[row.index].digest for row in _stored(view, view.items[index]) if not view_marks[row.index].plain}
        for view, view_marks, index in ((pairing.a, marks[0], i), (pairing.b, marks[1], j))
    ]
    return bool(digests[0] & digests[1])
