"""How long every activation of a graph is needed, and from that the most memory needed at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from graphopt.ops import Kind, Size, is_view, lookup

__all__ = ["Lifetime", "lifetimes", "peak_step"]


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `bytes` made at step `first` of the graph and needed until step `last`, both included."""

    name: str
    bytes: Size
    first: int
    last: int


def lifetimes(graph: Graph, volume: Callable[[Node], Size]) -> tuple[Lifetime, ...]:
    """The buffers of the inputs, the outputs and everything between, in order of creation; weights are left out.
    `volume` gives the bytes of what a node makes.

    A view keeps the buffer it looks into alive and takes no memory. The caller holds the inputs during the whole
    call. Every buffer is separate: an operator does not write over its input.
    """
    steps = {node: step for step, node in enumerate(graph.nodes)}
    end = len(steps) - 1
    owners: dict[Node, frozenset[Node]] = {}
    last: dict[Node, int] = {}
    for node, step in steps.items():
        for source in node.all_input_nodes:
            for owner in owners[source]:
                last[owner] = max(step, last[owner])
        if node.op == "get_attr" or node.op == "output":
            owners[node] = frozenset()
        elif is_view(node):
            owners[node] = owners[node.all_input_nodes[0]]
        else:
            owners[node] = frozenset((node,))
            last[node] = end if node.op == "placeholder" else step
    return tuple(
        Lifetime(node.name, volume(node), steps[node], until)
        for node, until in last.items()
        if (info := lookup(node.target)) is None or info.kind is not Kind.SIZE
    )


def peak_step(buffers: Sequence[Lifetime], measure: Callable[[Size], int]) -> int:
    """The step at which the buffers alive take the most bytes by `measure`; the first of several."""
    change: dict[int, int] = {}
    for buffer in buffers:
        size = measure(buffer.bytes)
        change[buffer.first] = change.get(buffer.first, 0) + size
        change[buffer.last + 1] = change.get(buffer.last + 1, 0) - size
    most = level = best = 0
    for step in sorted(change):
        level += change[step]
        if level > most:
            most, best = level, step
    return best
