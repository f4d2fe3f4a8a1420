"""Weights that lost, gained or exchanged positions together: one pruned group of channels is one difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch

from graphopt.diff.entries import Change
from graphopt.diff.pairing import Pairing
from graphopt.diff.streaming import distance
from graphopt.diff.tensors import AxisMap, TensorDiff
from graphopt.diff.view import family

__all__ = ["ChannelGroup", "find_channel_groups"]

_OUT, _IN, _BOTH = "out", "in", "both"
_Key = tuple[str, int]
_Known = Counter[tuple[int, int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Pairs, by number, with those of their weight changes that belong to one group of positions.

    `axis` is the map of the first weight that makes the positions; `permuted` groups keep all of them.
    """

    members: Mapping[int, tuple[Change, ...]]
    axis: AxisMap
    permuted: bool


def find_channel_groups(pairing: Pairing, changes: Mapping[int, Sequence[Change]]) -> list[ChannelGroup]:
    """The groups, in order of their first pair. A weight that lost positions of two groups is in both."""
    rows = [
        (number, change, change.tensor)
        for number, found in changes.items()
        for change in found
        if change.kind == "weight" and change.tensor is not None
    ]
    sliced = [row for row in rows if row[2].relation in ("sliced", "resized")]
    groups = _sliced_groups(pairing, sliced) if any(row[2].relation == "sliced" for row in sliced) else []
    return groups + _permuted_groups(row for row in rows if row[2].relation == "permuted")


def _sliced_groups(pairing: Pairing, rows: list[tuple[int, Change, TensorDiff]]) -> list[ChannelGroup]:
    graph = _shape_graph(pairing)
    uses: dict[_Key, list[tuple[int, Change, TensorDiff, int]]] = {}
    for number, change, tensor in rows:
        for axis in _axes(tensor):
            key = (_side(pairing, number, change.name, axis, tensor), number)
            graph.add_node(key)
            uses.setdefault(key, []).append((number, change, tensor, axis))
    for key in uses:
        _connect(graph, pairing, key)
    found = []
    for part in nx.connected_components(graph):
        members = [use for key in sorted(part) for use in uses.get(key, ())]
        group = _group(pairing, members)
        if group is not None:
            found.append(group)
    return sorted(found, key=lambda group: min(group.members))


def _shape_graph(pairing: Pairing) -> nx.Graph:
    """The values whose shape changed, joined where one is made from the other without mixing channels anew."""
    graph = nx.Graph()
    for i, j in pairing.pairs():
        changed = [("value", i)] if _shape_changed(pairing, i, j) else []
        graph.add_nodes_from(changed)
        if _mixes(pairing, i):
            continue
        sources = [
            ("value", source)
            for _, source in pairing.a.data_operands(i)
            if (mate := pairing.mate_a[source]) is not None and _shape_changed(pairing, source, mate)
        ]
        # Query and key of attention lose positions together, of which its result shows nothing.
        if pairing.a.items[i].operator == "scaled_dot_product_attention" and not _heads_changed(pairing, i, j):
            query_key = [("value", source) for _, source in list(pairing.a.data_operands(i))[:2]]
            nx.add_path(graph, [source for source in sources if source in query_key])
            sources = [source for source in sources if source not in query_key]
        nx.add_path(graph, [*changed, *sources])
    return graph


def _heads_changed(pairing: Pairing, i: int, j: int) -> bool:
    dims = [view.items[at].shape.split(", ")[-3:-2] for view, at in ((pairing.a, i), (pairing.b, j))]
    return dims[0] != dims[1]


def _connect(graph: nx.Graph, pairing: Pairing, key: _Key) -> None:
    side, number = key
    if side in (_OUT, _BOTH) and ("value", number) in graph:
        graph.add_edge(key, ("value", number))
    if side in (_IN, _BOTH):
        for _, source in pairing.a.data_operands(number):
            if ("value", source) in graph:
                graph.add_edge(key, ("value", source))


def _shape_changed(pairing: Pairing, i: int, j: int) -> bool:
    return pairing.a.items[i].shape.partition("[")[2] != pairing.b.items[j].shape.partition("[")[2]


def _mixes(pairing: Pairing, i: int) -> bool:
    """Whether the output channels of a call are other ones than its input channels: a layer with a stored weight."""
    item = pairing.a.items[i]
    return (
        (
            family(item.operator) in ("matrix product", "convolution", "lookup")
            or item.operator.startswith("conv_transpose")
        )
        and bool(pairing.a.tensors(i))
        and not _is_depthwise(pairing, i)
    )


def _is_layer(pairing: Pairing, i: int) -> bool:
    """Whether the positions of its weights are channels, and not, say, those of a table of positions."""
    return _mixes(pairing, i) or family(pairing.a.items[i].operator).endswith("norm") or _is_depthwise(pairing, i)


def _is_depthwise(pairing: Pairing, i: int) -> bool:
    groups = pairing.a.items[i].attributes.get("groups", 1)
    return isinstance(groups, int) and groups > 1


def _axes(tensor: TensorDiff) -> list[int]:
    if len(tensor.shape_a) != len(tensor.shape_b):
        return []
    return [axis for axis, (x, y) in enumerate(zip(tensor.shape_a, tensor.shape_b, strict=True)) if x != y]


def _side(pairing: Pairing, number: int, slot: str, axis: int, tensor: TensorDiff) -> str:
    """Whether an axis of a weight goes with what the layer makes or with what it reads."""
    item = pairing.a.items[number]
    if not _mixes(pairing, number) or len(tensor.shape_a) == 1:
        return _OUT if _mixes(pairing, number) else _BOTH
    if item.operator.startswith("conv_transpose") or (item.operator not in ("linear",) and slot in ("mat2", "other")):
        return _IN if axis == len(tensor.shape_a) - 2 or axis == 0 else _OUT
    if family(item.operator) == "lookup":
        return _OUT if axis else _IN
    return _OUT if axis == 0 else _IN


def _group(pairing: Pairing, members: list[tuple[int, Change, TensorDiff, int]]) -> ChannelGroup | None:
    """A group, if some weight in it shows which positions are kept; others may have been refitted since."""
    maps = [(number, axis, one) for number, _, tensor, axis in members for one in tensor.axes if one.axis == axis]
    if not maps or not any(_is_layer(pairing, number) for number, *_ in members):
        return None
    known = Counter((one.size_a, one.size_b, one.kept) for _, _, one in maps)
    found: dict[int, list[Change]] = {}
    for number, change, tensor, axis in members:
        if tensor.relation == "resized":
            tensor = _refitted(pairing, tensor, axis, known)
        if tensor.relation == "sliced":
            found.setdefault(number, []).append(replace(change, tensor=tensor))
    lead = min(maps, key=lambda row: (row[0], row[1]))
    return ChannelGroup({number: tuple(rows) for number, rows in sorted(found.items())}, lead[2], permuted=False)


def _refitted(
    pairing: Pairing, tensor: TensorDiff, axis: int, known: Counter[tuple[int, int, tuple[int, ...]]]
) -> TensorDiff:
    """The tensor as sliced like its group, with how far its numbers are from the slice; as it was where none fits."""
    if _axes(tensor) != [axis]:
        return tensor
    size_a, size_b = tensor.shape_a[axis], tensor.shape_b[axis]
    fitting = [kept for (x, y, kept), _ in known.most_common() if (x, y) == (size_a, size_b)]
    if not fitting:
        return tensor
    a = pairing.a.model.params[tensor.name_a].detach()
    b = pairing.b.model.params[tensor.name_b].detach()
    positions = torch.tensor(fitting[0], dtype=torch.int64)
    large, small = (a, b) if size_a > size_b else (b, a)
    if large.device.type == "meta" or large.dtype != small.dtype:
        return tensor
    gap = distance(large.index_select(axis, positions), small)
    return replace(
        tensor,
        relation="sliced",
        axes=(AxisMap(axis, size_a, size_b, fitting[0]),),
        error=0.0 if gap is None else gap.relative,
        largest=None if gap is None else gap.largest,
    )


def _permuted_groups(rows: Iterable[tuple[int, Change, TensorDiff]]) -> list[ChannelGroup]:
    """Weights that were put in one and the same order belong together."""
    graph = nx.Graph()
    found: dict[tuple[int, ...], list[tuple[int, Change, AxisMap]]] = {}
    for number, change, tensor in rows:
        for one in tensor.axes:
            found.setdefault(one.kept, []).append((number, change, one))
            graph.add_edge(("order", one.kept), ("order", tensor.axes[0].kept))
    groups = []
    for part in nx.connected_components(graph):
        uses = sorted((use for _, kept in part for use in found[kept]), key=lambda use: (use[0], use[2].axis))
        members: dict[int, list[Change]] = {}
        for number, change, _ in uses:
            if change not in members.setdefault(number, []):
                members[number].append(change)
        groups.append(ChannelGroup({n: tuple(c) for n, c in members.items()}, uses[0][2], permuted=True))
    return sorted(groups, key=lambda group: min(group.members))
