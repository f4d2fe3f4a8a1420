"""From two views to pairs and entries, from the same side whichever is given first."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from graphopt.diff.changes import Changes
from graphopt.diff.channels import find_channel_groups
from graphopt.diff.entries import Change, Entry, Pair
from graphopt.diff.hashing import up_hashes
from graphopt.diff.labels import Interner, labels_of
from graphopt.diff.matching import Marks, marks_of, match_views
from graphopt.diff.moves import find_moves
from graphopt.diff.operands import Mismatch, Operands
from graphopt.diff.pairing import Pairing
from graphopt.diff.regions import Region, find_regions
from graphopt.diff.tensors import TensorDiff
from graphopt.diff.view import View

__all__ = ["Comparison", "compare_views"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pairs in the order of the first graph, entries without titles, and every pair of tensors that was compared.

    `values` are the items that should compute the same: pairs, and what stands at the end of a rewritten region.
    """

    pairs: tuple[Pair, ...]
    entries: tuple[Entry, ...]
    tensors: tuple[TensorDiff, ...]
    values: tuple[tuple[int, int], ...]

    def mirrored(self) -> Comparison:
        """The same from the other side."""
        pairs = sorted((pair.mirrored() for pair in self.pairs), key=lambda pair: pair.a)
        entries = tuple(entry.mirrored() for entry in self.entries)
        values = sorted((j, i) for i, j in self.values)
        return Comparison(tuple(pairs), entries, tuple(tensor.mirrored() for tensor in self.tensors), tuple(values))


def compare_views(a: View, b: View, *, tolerance: float = 0.0, weights: bool = True) -> Comparison:
    """Match two views and say what changed. `compare_views(b, a)` says the same from the other side."""
    marks = marks_of(a), marks_of(b)
    # Wherever a choice is arbitrary it has to be the same for both orders, so the order is settled here.
    if _rank(a, marks[0]) > _rank(b, marks[1]):
        return _compare(b, a, (marks[1], marks[0]), tolerance, weights).mirrored()
    return _compare(a, b, marks, tolerance, weights)


def _rank(view: View, marks: Marks) -> tuple[int, bytes, bytes]:
    state, names = blake2b(digest_size=16), blake2b(digest_size=16)
    rows = []
    for item in view.items:
        digests = [marks[source].digest for _, source in item.operands if source in marks]
        rows.append(repr((item.kind, item.operator, item.attributes, item.shape, digests)))
        names.update(f"{item.name}\0{item.path}\0{item.tensor}\0".encode("utf-8", "surrogatepass"))
    for row in sorted(rows):
        state.update(row.encode("utf-8", "surrogatepass"))
    return len(view.items), state.digest(), names.digest()


def _compare(a: View, b: View, marks: tuple[Marks, Marks], tolerance: float, weights: bool) -> Comparison:
    pairing = match_views(a, b, marks)
    operands = Operands(pairing, _values(pairing, marks))
    moves = find_moves(pairing, operands)
    differ = Changes(pairing, marks, tolerance=tolerance, weights=weights)
    mismatches: dict[int, list[Mismatch]] = {}
    changes: dict[int, list[Change]] = {}
    for i, j in pairing.pairs():
        rows = operands.mismatches(i, j) if i not in operands.hidden else []
        if rows:
            mismatches[i] = rows
        if found := differ.of(i, j, rows):
            changes[i] = found
    regions = find_regions(pairing, mismatches, changes, marks)
    entries = _Entries(pairing, operands, changes).make(regions, moves)
    pairs = tuple(Pair(i, j, tuple(changes.get(i, ()))) for i, j in pairing.pairs())
    inside = {number for region in regions if region.rewritten for number in region.pairs}
    values = _equal_values(pairing, mismatches, inside)
    return Comparison(pairs, tuple(entries), tuple(differ.tensors.values()), tuple(values))


def _equal_values(pairing: Pairing, mismatches: dict[int, list[Mismatch]], inside: set[int]) -> list[tuple[int, int]]:
    """Pairs outside of rewritten regions, and what pairs read where one side has no partner: a region's result."""
    found = {(i, j) for i, j in pairing.pairs() if i not in inside}
    for rows in mismatches.values():
        for one in rows:
            if one.rewired or len(one.before) != 1 or len(one.after) != 1:
                continue
            x, y = one.before[0], one.after[0]
            loose = pairing.mate_a[x] is None or x in inside or pairing.mate_b[y] is None
            if loose or pairing.mate_b[y] in inside:
                found.add((x, y))
    return sorted(found)


def _values(pairing: Pairing, marks: tuple[Marks, Marks]) -> tuple[list[int], list[int]]:
    """A number for what every item computes from the inputs, to tell which values are equal though not paired."""
    intern = Interner()
    sides = []
    for view, mate, digests in ((pairing.a, pairing.number_a, marks[0]), (pairing.b, pairing.number_b, marks[1])):
        inputs = [mate[item.index] if item.kind == "input" else None for item in view.items]
        sides.append(up_hashes(view, labels_of(view, "full", digests, intern), inputs, intern))
    return sides[0], sides[1]


class _Entries:
    """Puts together what is one difference. `changes` are those of the pairs, by number; each goes to one entry."""

    def __init__(self, pairing: Pairing, operands: Operands, changes: dict[int, list[Change]]) -> None:
        self.pairing, self.operands, self.changes = pairing, operands, changes
        self.left = {number: [row for row in rows if not row.derived] for number, rows in changes.items()}

    def make(self, regions: list[Region], moves: list[list[int]]) -> list[Entry]:
        entries = [self._moved(block) for block in moves]
        for region in regions:
            entries.append(self._region(region))
        entries += self._channels()
        for number, rows in self.left.items():
            if rows:
                entries.append(Entry("changed", "", "", pairs=(self._pair(number, self.changes[number]),)))
        return sorted(entries, key=self._place)

    def _pair(self, number: int, rows: list[Change] | tuple[Change, ...]) -> Pair:
        mate = self.pairing.mate_a[number]
        assert mate is not None
        return Pair(number, mate, tuple(rows))

    def _moved(self, block: list[int]) -> Entry:
        rest = {"operand", "weight"}  # a moved node that also changed is told twice; what it reads is the move itself
        for number in block:
            self.left[number] = [row for row in self.left.get(number, ()) if row.kind not in rest or row.tensor]
        return Entry("moved", "", "", pairs=tuple(self._pair(number, ()) for number in block))

    def _region(self, region: Region) -> Entry:
        pairs = []
        for number in region.pairs:
            pairs.append(self._pair(number, self.changes.get(number, [])))
            self.left.pop(number, None)
        kind = "rewritten" if region.rewritten else "removed" if region.removed else "inserted"
        return Entry(kind, "", "", tuple(region.removed), tuple(region.inserted), tuple(pairs))  # type: ignore[arg-type]  # mypy widens the conditional

    def _channels(self) -> list[Entry]:
        entries = []
        open_changes = {number: rows for number, rows in self.left.items() if rows}
        for group in find_channel_groups(self.pairing, open_changes):
            pairs = []
            for number, members in group.members.items():
                names = {row.name for row in members}
                self.left[number] = [row for row in self.left[number] if row.kind != "weight" or row.name not in names]
                pairs.append(self._pair(number, members))
            axis = group.axis
            kind = "permuted" if group.permuted else "pruned" if axis.size_a > axis.size_b else "widened"
            of = max(axis.size_a, axis.size_b)
            entries.append(Entry(kind, "", "", pairs=tuple(pairs), channels=axis.removed, of=of))  # type: ignore[arg-type]  # as above
        for number, rows in self.left.items():
            self.left[number] = [row for row in rows if not self._follows(row, open_changes.get(number, []), rows)]
        return entries

    @staticmethod
    def _follows(row: Change, before: list[Change], left: list[Change]) -> bool:
        """The number of groups of a depthwise convolution goes with its channels."""
        return row.kind == "attribute" and row.name == "groups" and len(left) < len(before)

    def _place(self, entry: Entry) -> tuple[float, int]:
        """Where in the first graph it stands; what was inserted stands behind what it reads."""
        if entry.a:
            return float(entry.a[0]), 0
        reach = self.operands.reach(entry.inserted[0], side=1)
        return max(reach, default=-1) + 0.5, entry.inserted[0]
