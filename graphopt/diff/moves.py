"""Blocks that stand elsewhere: few nodes that, once looked through, leave the rest of both graphs wired alike."""

from __future__ import annotations

from collections import defaultdict

import networkx as nx

from graphopt.diff.operands import Operands
from graphopt.diff.pairing import Pairing

__all__ = ["find_moves"]

_TRIES = 64
_SEEN = 256


def find_moves(pairing: Pairing, operands: Operands) -> list[list[int]]:
    """Blocks of pairs, by number, that have moved; `operands` looks through them afterwards.

    Pairs whose edges correspond hang together. Where edges do not correspond the matched graph falls into blocks, and
    a block has moved if two or more other mismatches are explained by its standing elsewhere.
    """
    rewired = _rewired(pairing, operands, list(pairing.pairs()))
    if not rewired:
        return []
    moved: list[list[int]] = []
    for block in _blocks(pairing, operands)[:_TRIES]:
        hidden = operands.hidden
        operands.hide(hidden | set(block))
        left = _rewired(pairing, operands, rewired)
        if len(left) + 1 < len(rewired) or (len(left) + 1 == len(rewired) and set(block) & {i for i, _ in rewired}):
            if len(left) + 1 == len(rewired) and not _whole(pairing, operands, block):
                operands.hide(hidden)
                continue
            moved.append(block)
            rewired = left
        else:
            operands.hide(hidden)
        if not rewired:
            break
    return moved


def _whole(pairing: Pairing, operands: Operands, block: list[int]) -> bool:
    """Whether nothing that enters the block stayed the same: reading one other operand is no move."""
    members = set(block)
    for i in block:
        j = pairing.mate_a[i]
        assert j is not None
        sources = [pairing.number_b[y] for _, y in pairing.b.data_operands(j)]
        for _, x in pairing.a.data_operands(i):
            if x not in members and pairing.number_a[x] is not None and pairing.number_a[x] in sources:
                return False
    users = {user for i in block for _, user in pairing.a.users[i]} - members
    for user in users:
        mate = pairing.mate_a[user]
        if mate is not None and any(pairing.number_b[y] in members for _, y in pairing.b.data_operands(mate)):
            return False
    return True


def _rewired(pairing: Pairing, operands: Operands, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        (i, j) for i, j in pairs if i not in operands.hidden and any(one.rewired for one in operands.mismatches(i, j))
    ][:_SEEN]


def _blocks(pairing: Pairing, operands: Operands) -> list[list[int]]:
    """Connected parts of the matched graph, without those that hold an input or the output, the smallest first."""
    graph = nx.Graph()
    fixed = {pairing.a.output, *(item.index for item in pairing.a.inputs())}
    for i, j in pairing.pairs():
        graph.add_node(i)
        sources: defaultdict[int, int] = defaultdict(int)
        for _, y in pairing.b.data_operands(j):
            for number in operands.reach(y, side=1):
                sources[number] += 1
        for _, x in pairing.a.data_operands(i):
            for number in operands.reach(x, side=0):
                if sources.get(number):
                    graph.add_edge(i, number)
    blocks = [sorted(part) for part in nx.connected_components(graph) if not part & fixed]
    return sorted(blocks, key=lambda block: (len(block), block))
