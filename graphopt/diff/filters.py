"""What of the differences to leave out: kinds of changes, operators, modules, tensors and attributes by pattern."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from graphopt.diff.entries import KINDS, Change, Entry
from graphopt.diff.view import View
from graphopt.errors import UsageError
from graphopt.names import nearest

__all__ = ["Filter"]

_CHANGES = {"weights": "weight", "attributes": "attribute", "shapes": "shape", "dtypes": "dtype", "operands": "operand"}
_FIELDS = ("module", "operator", "tensor", "attribute")


@dataclass(frozen=True, slots=True)
class Filter:
    """Drops changes, and entries that nothing is left of."""

    kinds: frozenset[str]
    patterns: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Filter:
        """Read texts such as `weights`, `moved` or `module=classifier.*`.

        Raises:
            UsageError: for a text that is neither a kind nor FIELD=PATTERN.
        """
        kinds: set[str] = set()
        patterns: list[tuple[str, str]] = []
        for text in texts:
            field, mark, pattern = text.partition("=")
            if mark and field in _FIELDS and pattern:
                patterns.append((field, pattern))
            elif text in _CHANGES or text in KINDS:
                kinds.add(text)
            else:
                known = [*_CHANGES, *KINDS, *(f"{name}=PATTERN" for name in _FIELDS)]
                raise UsageError(f"'{text}' cannot be ignored: {nearest(text, known)}", todo=f"use {', '.join(known)}")
        return cls(frozenset(kinds), tuple(patterns))

    def apply(self, entries: Iterable[Entry], a: View, b: View) -> tuple[Entry, ...]:
        """The entries that are left, without the changes that are ignored."""
        if not self.kinds and not self.patterns:
            return tuple(entries)
        return tuple(left for entry in entries if (left := self._left(entry, a, b)) is not None)

    def _left(self, entry: Entry, a: View, b: View) -> Entry | None:
        if entry.kind in self.kinds or self._matches_nodes(entry, a, b):
            return None
        pairs = [replace(pair, changes=tuple(c for c in pair.changes if not self._drops(c))) for pair in entry.pairs]
        if entry.kind in ("changed", "pruned", "widened", "permuted"):
            pairs = [pair for pair in pairs if pair.own]
            return replace(entry, pairs=tuple(pairs)) if pairs else None
        return replace(entry, pairs=tuple(pairs))

    def _matches_nodes(self, entry: Entry, a: View, b: View) -> bool:
        items = [a.items[index] for index in entry.a] + [b.items[index] for index in entry.b]
        for field, pattern in self.patterns:
            if field == "module" and all(_below(item.path, pattern) for item in items):
                return True
            if field == "operator" and all(fnmatchcase(item.operator, pattern) for item in items):
                return True
        return False

    def _drops(self, change: Change) -> bool:
        if any(_CHANGES.get(kind) == change.kind for kind in self.kinds):
            return True
        for field, pattern in self.patterns:
            if field == "attribute" and change.kind == "attribute" and fnmatchcase(change.name, pattern):
                return True
            if field == "tensor" and change.kind == "weight":
                names = (change.tensor.name_a, change.tensor.name_b) if change.tensor else (change.before, change.after)
                if all(fnmatchcase(name, pattern) for name in names if name):
                    return True
        return False


def _below(path: str, pattern: str) -> bool:
    """Whether the pattern names the module or one around it."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
