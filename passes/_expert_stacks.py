"""Mixtures whose experts are stacked in tensors [experts, ...] of which the selected ones are taken by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graphopt.model import Model
from graphopt.ops import Kind, argument, lookup
from graphopt.params import ParamKind
from graphopt.passes._experts import Aligned
from graphopt.passes._mixtures import Mixture, common_module, router_of, why_fixed
from graphopt.rewriter import Node, Rewriter

__all__ = ["IndexedStack", "Stacks", "between", "indexed_stacks", "report_unsupported"]

aten = torch.ops.aten


class Stacks(Mixture):
    """Experts in stored tensors [experts, ...], `stacks`, in the order in which they are read."""

    stacks: list[Node]

    def experts(self, model: Model) -> list[list[Tensor]]:
        stacks = [model.params[str(node.target)].detach() for node in self.stacks]
        return [[stack[expert] for stack in stacks] for expert in range(self.count)]

    def with_experts(self, model: Model, experts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        stacked = [torch.stack(list(tensors)) for tensors in zip(*experts, strict=True)]
        return {str(node.target): tensor for node, tensor in zip(self.stacks, stacked, strict=True)}


class IndexedStack(Stacks):
    """Experts that are taken from stacks by the indices of those that a router selected.

    `reads` are the calls that take them, in order.
    """

    def __init__(self, rw: Rewriter, ids: Node, logits: Node, reads: list[Node]) -> None:
        self.ids, self.routed, self.logits, self.at = ids, ids, logits, reads[0]
        place = {node: place for place, node in enumerate(rw.graph.nodes)}
        self.reads = sorted(reads, key=lambda node: place[_used_by(node)])
        self.stacks = [argument(node, "self") for node in self.reads]
        self.count = int(self.stacks[0].meta["val"].shape[0])
        end = max((_used_by(node) for node in self.reads), key=place.__getitem__)
        self.cone = between(self.reads, end, place)
        self.ends = [end]
        self.name = common_module([str(stack.target) for stack in self.stacks]) or self.at.name

    def uses(self, routed: Tensor) -> Tensor:
        return torch.bincount(routed.flatten(), minlength=self.count)

    def merge(self, rw: Rewriter, aligned: Aligned) -> None:
        """Every index is sent through a table of which group the expert is in; the router stays as it is."""
        groups = "; ".join(", ".join(map(str, sorted(group))) for group in aligned.groups)
        why = f"the experts of '{self.name}' are {len(aligned.groups)}: {groups}"
        table = torch.tensor(aligned.place(self.count), device=self.ids.meta["val"].device)
        name = f"{self.name}.merged" if self.name != self.at.name else "merged"
        places = rw.add_tensor(name, table, kind=ParamKind.BUFFER, like=self.at)
        first = min(self.reads, key=list(rw.graph.nodes).index)
        mapped = rw.call(aten.index.Tensor, places, [self.ids], before=first)
        for node, stack, tensors in zip(self.reads, self.stacks, zip(*aligned.merged, strict=True), strict=True):
            rw.set_tensor(stack, torch.stack(tensors), why)
            rw.update(node, why, indices=[mapped])


def indexed_stacks(rw: Rewriter) -> Iterator[IndexedStack]:
    """The mixtures of a model whose selected experts are taken by index; what looks like one and is none is skipped."""
    found: dict[Node, list[Node]] = {}
    for node in rw.find(aten.index.Tensor):
        stack, indices = argument(node, "self"), argument(node, "indices")
        stored = stack.op == "get_attr" and stack.meta["val"].is_floating_point()
        if stored and len(indices) == 1 and isinstance(indices[0], Node):
            found.setdefault(indices[0], []).append(node)
    for ids, reads in found.items():
        counts = {int(argument(node, "self").meta["val"].shape[0]) for node in reads}
        logits = router_of(ids, min(counts)) if _is_selected(ids) else None
        if logits is None:
            continue  # a table of anything else
        why = None if len(counts) == 1 else f"its stacks are of {' and '.join(map(str, sorted(counts)))} experts"
        why = why or _why_not(rw, reads)
        if why is not None:
            rw.skip(reads[0], f"no mixture of experts: {why}")
        else:
            yield IndexedStack(rw, ids, logits, reads)


def _is_selected(ids: Node) -> bool:
    """Whether indices come out of a selection of the largest."""
    for _ in range(8):
        if ids.op != "call_function":
            return False
        if ids.target in (aten.topk.default, aten.argmax.default, aten.sort.default, aten.max.dim):
            return True
        info = lookup(ids.target)
        if info is not None and info.kind not in (Kind.MOVEMENT, Kind.ELEMENTWISE):
            return False
        ids = ids.all_input_nodes[0]
    return False


def _why_not(rw: Rewriter, reads: Sequence[Node]) -> str | None:
    if any(argument(node, "indices")[0].meta["val"].dtype not in (torch.int64, torch.int32) for node in reads):
        return "its indices are no integers"
    for node in reads:
        stack = argument(node, "self")
        why = why_fixed(rw, stack, node)
        if why is not None:
            return why
        if len(node.users) != 1:
            return f"'{node.name}', a stack's selected experts, is used {len(node.users)} times"
    return None


def _used_by(node: Node) -> Node:
    """The call that computes with what was taken from a stack, behind movements of it."""
    while True:
        node = next(iter(node.users))
        info = lookup(node.target) if node.op == "call_function" else None
        if info is None or info.kind is not Kind.MOVEMENT or len(node.users) != 1:
            return node


def between(reads: Sequence[Node], end: Node, place: dict[Node, int]) -> list[Node]:
    """The calls that depend on what was taken and lead to the end, in order."""
    after: set[Node] = set(reads)
    for node in sorted(place, key=place.__getitem__)[: place[end] + 1]:
        if any(used in after for used in node.all_input_nodes):
            after.add(node)
    before, waiting = {end}, [end]
    while waiting:
        for used in waiting.pop().all_input_nodes:
            if used in after and used not in before:
                before.add(used)
                waiting.append(used)
    return sorted(before, key=place.__getitem__)


def report_unsupported(rw: Rewriter) -> None:
    """Name the kernels that mixtures are computed with and that are not understood."""
    for node in rw.find():
        if "grouped_mm" in str(node.target):
            rw.skip(
                node,
                f"no mixture of experts that is understood: '{node.target}' multiplies with sorted experts; set the "
                "configuration's experts_implementation to 'batched_mm' before the model is captured",
            )
