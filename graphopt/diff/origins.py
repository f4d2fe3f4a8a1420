"""Which passes of a model's history do such a thing as was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt.diff.entries import Entry
from graphopt.diff.view import Item, View, family
from graphopt.errors import GraphoptError

__all__ = ["Origins", "is_later", "new_passes"]

_CHANNELS = ("prune-channels", "remove-channels", "remove-zeros", "compress")
_IDENTITIES = {"dropout", "alpha_dropout", "feature_dropout", "clone", "contiguous", "detach", "alias", "to"}
_REARRANGING = {"unsqueeze", "squeeze", "expand", "permute", "flatten", "unflatten"}
_AFFINE = {"add", "sub", "mul", "div", "rsub", "neg"}
_TAKEN_APART = {"split_with_sizes", "getitem", "slice"}


def new_passes(a: Sequence[str], b: Sequence[str]) -> tuple[str, ...]:
    """The passes that one history has and the other has not, presets and repetitions spelt out."""
    long, short = (b, a) if len(b) >= len(a) else (a, b)
    common = 0
    while common < len(short) and long[common] == short[common]:
        common += 1
    return tuple(dict.fromkeys(name for text in long[common:] for name in _names(text)))


def _names(text: str) -> Iterator[str]:
    from graphopt.pipeline import Pipeline

    try:
        yield from (step.name for step in Pipeline.parse(text).passes())
    except GraphoptError:  # a pass that is not installed here, or an older spelling
        yield text.partition("{")[0].strip()


def is_later(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether `b` is the model that the passes were applied to."""
    return len(b) >= len(a)


class Origins:
    """Tells which of the passes that made `after` out of `before` do such a thing as an entry says."""

    def __init__(self, before: View, after: View, known: Sequence[str]) -> None:
        self.before, self.after, self.known = before, after, known
        self._varies: set[int] = set()
        for item in before.items:
            if item.kind == "input" or any(source in self._varies for _, source in item.operands):
                self._varies.add(item.index)
        self._dead = {item.index for item in before.calls()} - _upwards(before)

    def behind(self, entry: Entry) -> tuple[str, ...]:
        """The passes, in their order; the only one there is where no rule speaks. `entry` is seen from `before`."""
        if not self.known:
            return ()
        gone = [self.before.items[index] for index in entry.removed]
        come = [self.after.items[index] for index in entry.inserted]
        found = set(self._rules(entry, gone, come)) & set(self.known)
        if not found and len(self.known) == 1:
            return (self.known[0],)
        return tuple(name for name in self.known if name in found)

    def _rules(self, entry: Entry, gone: list[Item], come: list[Item]) -> Iterator[str]:
        apart = any(_bare(item) in _TAKEN_APART for item in come)
        if entry.kind in ("pruned", "widened") or (entry.kind == "rewritten" and not apart and _resizes(entry)):
            yield from _CHANNELS
        names = {_bare(item) for item in gone}
        if names & _IDENTITIES or any(self._is_identity(item) for item in gone):
            yield "remove-identity"
        if any(_rearranges(item) for item in gone):
            yield "simplify-shapes"
        if gone and (any(item.kind == "tensor" for item in come) or not {i.index for i in gone} & self._varies):
            yield "fold-constants"
        if entry.kind == "rewritten" and any(family(item.operator) == "batch norm" for item in gone):
            yield "fold-batch-norm"
        if entry.kind == "rewritten" and names & _AFFINE:
            yield "fuse-affine"
        layers = any(family(item.operator) in ("matrix product", "convolution") for item in gone)
        if layers and apart:
            yield "merge-parallel-linear"
        if entry.kind == "removed" and all(item.index in self._dead for item in gone):
            yield "dead-code"
        elif entry.kind == "removed" and not names & _IDENTITIES and not any(_rearranges(item) for item in gone):
            yield "common-subexpressions"

    def _is_identity(self, item: Item) -> bool:
        """Whether a call returns what it reads: it rearranges nothing, or adds zero, or multiplies by one."""
        sources = [self.before.items[source] for _, source in item.operands]
        if len(sources) != 1 or sources[0].shape != item.shape:
            return False
        neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(_bare(item))
        return _rearranges(item) or (neutral is not None and item.attributes.get("other") == neutral)


def _upwards(view: View) -> set[int]:
    """Everything that the outputs need."""
    needed = {view.output}
    for item in reversed(view.items):
        if item.index in needed:
            needed.update(source for _, source in item.operands)
    return needed


def _resizes(entry: Entry) -> bool:
    """Whether a layer that stayed has a weight of another shape: it was rewritten and lost channels, both."""
    tensors = [change.tensor for pair in entry.pairs for change in pair.changes if change.tensor is not None]
    return any(tensor.relation in ("resized", "sliced") for tensor in tensors)


def _bare(item: Item) -> str:
    return item.operator.partition(".")[0]


def _rearranges(item: Item) -> bool:
    return family(item.operator) in ("shape", "transposition") or _bare(item) in _REARRANGING
