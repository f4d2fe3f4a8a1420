"""What a comparison says: pairs with what changed in them, and entries, each one difference to read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from graphopt.diff.tensors import TensorDiff

__all__ = ["KINDS", "Change", "ChangeKind", "Entry", "EntryKind", "Pair"]

ChangeKind = Literal["operator", "attribute", "operand", "weight", "dtype", "shape"]
EntryKind = Literal["changed", "moved", "inserted", "removed", "rewritten", "pruned", "widened", "permuted"]
KINDS: tuple[EntryKind, ...] = (
    "rewritten",
    "removed",
    "inserted",
    "changed",
    "moved",
    "pruned",
    "widened",
    "permuted",
)

_MIRRORED: dict[EntryKind, EntryKind] = {
    "inserted": "removed",
    "removed": "inserted",
    "pruned": "widened",
    "widened": "pruned",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing in which two matched nodes differ.

    Attributes:
        kind: the operator itself, an attribute, what it reads, a weight, the dtype or the shape of what it makes.
        name: the attribute or slot; empty for operator, dtype and shape.
        before, after: the two values as plain data; names of nodes for operands, None for what is not there.
        tensor: for a weight that both have, what became of it.
        derived: follows from a change elsewhere, such as the shape behind a pruned layer; no difference by itself.
    """

    kind: ChangeKind
    name: str
    before: Any
    after: Any
    tensor: TensorDiff | None = None
    derived: bool = False

    def mirrored(self) -> Change:
        return replace(
            self, before=self.after, after=self.before, tensor=self.tensor.mirrored() if self.tensor else None
        )

    def to_json(self) -> dict[str, Any]:
        rows = {
            "kind": self.kind,
            "name": self.name,
            "before": _plain(self.before),
            "after": _plain(self.after),
            "derived": self.derived,
        }
        return rows | ({"tensor": self.tensor.to_json()} if self.tensor else {})


@dataclass(frozen=True, slots=True)
class Pair:
    """Item `a` of the first graph is item `b` of the second; `changes` is empty where they are equal."""

    a: int
    b: int
    changes: tuple[Change, ...] = ()

    @property
    def own(self) -> tuple[Change, ...]:
        """The changes that do not follow from one elsewhere."""
        return tuple(change for change in self.changes if not change.derived)

    def mirrored(self) -> Pair:
        return Pair(self.b, self.a, tuple(change.mirrored() for change in self.changes))

    def to_json(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "changes": [change.to_json() for change in self.changes]}


@dataclass(frozen=True, slots=True)
class Entry:
    """One difference.

    Attributes:
        kind: `changed`: one matched pair; `moved`: the same nodes stand elsewhere; `inserted`, `removed`: nodes of one
            side; `rewritten`: a region that became another, such as a convolution and a batch norm that became one
            convolution; `pruned`, `widened`: channels that are gone or new, in every weight they belong to;
            `permuted`: weights with the same positions in another order.
        title: one line, such as `conv2d + batch_norm -> conv2d`.
        path: the module that all of it lies in.
        removed, inserted: items of the first and of the second graph that have no partner.
        pairs: matched pairs that are part of it, with the changes that belong to it.
        channels: for `pruned` and `widened`, the positions that only one side has; `of` is how many the longer has.
        passes: passes in the history of the file that do such a thing.
    """

    kind: EntryKind
    title: str
    path: str
    removed: tuple[int, ...] = ()
    inserted: tuple[int, ...] = ()
    pairs: tuple[Pair, ...] = ()
    channels: tuple[int, ...] = ()
    of: int = 0
    passes: tuple[str, ...] = ()

    @property
    def a(self) -> tuple[int, ...]:
        """All items of the first graph."""
        return tuple(sorted({*self.removed, *(pair.a for pair in self.pairs)}))

    @property
    def b(self) -> tuple[int, ...]:
        """All items of the second graph."""
        return tuple(sorted({*self.inserted, *(pair.b for pair in self.pairs)}))

    def mirrored(self) -> Entry:
        """The same from the other side; its title stays."""
        return replace(
            self,
            kind=_MIRRORED.get(self.kind, self.kind),
            removed=self.inserted,
            inserted=self.removed,
            pairs=tuple(sorted((pair.mirrored() for pair in self.pairs), key=lambda pair: pair.a)),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "title": self.title,
            "path": self.path,
            "removed": list(self.removed),
            "inserted": list(self.inserted),
            "pairs": [pair.to_json() for pair in self.pairs],
            "channels": list(self.channels),
            "of": self.of,
            "passes": list(self.passes),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
