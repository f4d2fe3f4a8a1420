"""The trunk of a model: values that all ways from its inputs to its outputs go through, and what is between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from graphopt.ops import Kind, lookup

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["between", "trunk"]


def trunk(model: Model) -> list[Node]:
    """The dominators of the outputs in order (the only input among them, if all outputs come from one). Sizes carry no
    values."""
    import networkx as nx

    start, end = object(), object()
    graph = nx.DiGraph()
    graph.add_node(start)
    for node in model.graph.nodes:
        if node.op == "placeholder":
            graph.add_edge(start, node)
        elif not _is_size(node):
            last = end if node.op == "output" else node
            graph.add_edges_from((used, last) for used in node.all_input_nodes if used in graph)
    if end not in graph:
        return []
    above = nx.immediate_dominators(graph, start)
    found = []
    node = above[end]
    while node is not start:
        found.append(node)
        node = above[node]
    return found[::-1]


def between(start: Node, end: Node) -> list[Node]:
    """The calls from which `end` is made of `start`, itself the last one, in the order of the graph. `start` is a value
    of the trunk before `end`."""
    found: set[Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not start and node not in found and node.op == "call_function":
            found.add(node)
            waiting += node.all_input_nodes
    return sorted(found)


def _is_size(node: Node) -> bool:
    info = lookup(node.target) if node.op == "call_function" else None
    return info is not None and info.kind is Kind.SIZE
