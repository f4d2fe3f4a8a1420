"""What has to hold of every diff, whatever the two models are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import networkx as nx

from graphopt.diff import GraphDiff, View
from graphopt.diff.view import family

__all__ = ["assert_consistent", "assert_mirrored"]


def assert_consistent(diff: GraphDiff) -> None:
    """One-to-one, complete, of like operators, in one order, and every change told exactly once."""
    a, b = diff.a.view, diff.b.view
    assert len({pair.a for pair in diff.pairs}) == len({pair.b for pair in diff.pairs}) == len(diff.pairs)
    for pair in diff.pairs:
        x, y = a.items[pair.a], b.items[pair.b]
        assert x.kind == y.kind != "tensor"
        assert family(x.operator) == family(y.operator), (x.operator, y.operator)
    _assert_complete(diff, a, [pair.a for pair in diff.pairs], [i for entry in diff.entries for i in entry.removed])
    _assert_complete(diff, b, [pair.b for pair in diff.pairs], [i for entry in diff.entries for i in entry.inserted])
    _assert_changes_are_told(diff)
    _assert_one_order(diff)


def _assert_complete(diff: GraphDiff, view: View, paired: list[int], alone: list[int]) -> None:
    """Every call is in a pair or in one entry."""
    tensors = {item.index for item in view.items if item.kind == "tensor"}
    count = Counter(paired) + Counter(index for index in alone if index not in tensors)
    assert set(count.values()) <= {1}
    assert {item.index for item in view.calls()} <= count.keys()


def _assert_changes_are_told(diff: GraphDiff) -> None:
    told = {(pair.a, change.kind, change.name) for entry in diff.entries for pair in entry.pairs for change in pair.own}
    moved = {pair.a for entry in diff.entries if entry.kind == "moved" for pair in entry.pairs}
    for pair in diff.pairs:
        for change in pair.own:
            follows = change.name == "groups" or (pair.a in moved and change.kind == "operand")
            assert follows or (pair.a, change.kind, change.name) in told, change
    assert all(entry.removed or entry.inserted or entry.pairs for entry in diff.entries)


def _assert_one_order(diff: GraphDiff) -> None:
    """Both graphs laid over each other have no cycle, but for what is said to have moved or to read something else."""
    partner = {pair.b: pair.a for pair in diff.pairs}
    free = {pair.a for entry in diff.entries if entry.kind == "moved" for pair in entry.pairs}
    free |= {pair.a for pair in diff.pairs if any(change.kind == "operand" for change in pair.changes)}
    both = nx.DiGraph()
    for item in diff.a.view.items:
        both.add_edges_from((("a", source), ("a", item.index)) for _, source in item.operands)
    for item in diff.b.view.items:
        end = ("a", partner[item.index]) if item.index in partner else ("b", item.index)
        for _, source in item.operands:
            start = ("a", partner[source]) if source in partner else ("b", source)
            if start[1] not in free and end[1] not in free:
                both.add_edge(start, end)
    if not free:
        assert nx.is_directed_acyclic_graph(both)


def assert_mirrored(diff: GraphDiff, back: GraphDiff) -> None:
    """The diff of the models the other way round says the same."""
    assert [pair.mirrored() for pair in back.pairs] == sorted(diff.pairs, key=lambda pair: pair.b)
    mirrored = [replace(entry.mirrored(), title="") for entry in back.entries]
    for entry in diff.entries:
        assert replace(entry, title="") in mirrored
    assert len(mirrored) == len(diff.entries)
    assert Counter(tensor.mirrored() for tensor in back.tensors) == Counter(diff.tensors)
