"""What could become one convolution, and what that would cost: the table that depth compression chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.analysis.trunk import between, trunk
from graphopt.analysis.widths import layer_macs
from graphopt.ops import Kind, lookup
from graphopt.passes._kernel import Kernel
from graphopt.passes._linearise import Region, is_activation, region, start, windows
from graphopt.passes._merged_layer import Price, common_path, emit
from graphopt.passes._merged_norm import norm_to_keep, normed
from graphopt.rewriter import Node, Rewriter

__all__ = ["Candidate", "Replacement", "Table"]


@dataclass(frozen=True)
class Candidate:
    """One convolution with a window of `size` for a region.

    Attributes:
        start, end: places of the trunk.
        cost: of the convolution.
        apart: of the layers that it would replace.
    """

    start: int
    end: int
    part: Region
    size: int
    cost: float
    apart: float

    @property
    def label(self) -> str:
        return f"{self.part.source.name} to {self.part.target.name} by {self.size}"


class Table:
    """All candidates of a model that cost less than the layers they would replace.

    Attributes:
        values: the trunk.
        costs: for every value of it, of the layers between the one before and itself.
        candidates: in the order of where they end.

    Args:
        largest: window of a candidate.
        longest: how many layers one may replace.
    """

    def __init__(self, rw: Rewriter, price: Price, *, largest: int, longest: int) -> None:
        self.rw, self.price, self.largest, self.longest = rw, price, largest, longest
        self.values = trunk(rw.model)
        self._macs = layer_macs(rw.model) if price.table is None else {}
        self._why: dict[Node, str] = {}
        self.costs = [0.0] + [
            sum(self._cost(node) for node in between(source, target))
            for source, target in zip(self.values, self.values[1:], strict=False)
        ]
        self.candidates = [one for end in range(1, len(self.values)) for one in self._ending(end)]

    def report(self) -> None:
        """Say of every layer that has no part in any candidate why."""
        inside = {node for one in self.candidates for node in one.part.nodes}
        for node, reason in self._why.items():
            if node not in inside and (lookup(node.target) is None or _has_weights(node)):
                self.rw.skip(node, reason)

    def _cost(self, node: Node) -> float:
        info = lookup(node.target)
        if info is None or info.kind not in (Kind.CONTRACTION, Kind.ATTENTION):
            return 0.0
        return self._macs.get(node, 0.0) if self.price.table is None else self.price.of_call(node)

    def _ending(self, end: int) -> Iterator[Candidate]:
        target = self.values[end]
        if _follows(target) or not isinstance(self.rw.value(target), Tensor):
            return  # a norm and an activation at the end stay
        for begin in range(end - 1, -1, -1):
            source = self.values[begin]
            part = region(self.rw, source, target) if isinstance(self.rw.value(source), Tensor) else "it is no tensor"
            if isinstance(part, str):
                self._note(between(source, target), part)
                return  # a longer one holds this one
            if sum(map(_has_weights, part.nodes)) > self.longest:
                return
            if part.steps and not _follows(self.values[begin + 1]) and len(part.nodes) > 1:
                yield from self._windows(begin, end, part)
            elif part.unread is not None:
                self._note(part.nodes, part.unread)

    def _windows(self, begin: int, end: int, part: Region) -> Iterator[Candidate]:
        apart = sum(self.costs[begin + 1 : end + 1])
        sizes = windows(self.rw, part, self.largest)
        if not sizes:
            self._note(
                part.nodes, f"one convolution for it would be wider than {self.largest}, or make other positions"
            )
        for size in sizes:
            kernel = start(self.rw, part, size, meta=True)
            cost = self.price.of_kernel(self.rw, kernel, part.source, part.target)
            if cost < apart:
                yield Candidate(begin, end, part, size, cost, apart)
            else:
                self._note(part.nodes, f"one convolution for it {self._takes(cost, apart)}")

    def _takes(self, cost: float, apart: float) -> str:
        if self.price.table is None:
            return f"would take {int(cost):,} instead of {int(apart):,} multiply-accumulates"
        return f"would take {cost * 1e6:,.1f} instead of {apart * 1e6:,.1f} microseconds on {self.price.target}"

    def _note(self, nodes: Iterator[Node] | tuple[Node, ...] | list[Node], why: str) -> None:
        for node in nodes:
            self._why.setdefault(node, why)


def _follows(node: Node) -> bool:
    """Whether a call belongs to the layer before it."""
    return is_activation(node) or node.target is torch.ops.aten.batch_norm.default


def _has_weights(node: Node) -> bool:
    info = lookup(node.target)
    return info is not None and info.kind is Kind.CONTRACTION and any(n.op == "get_attr" for n in node.all_input_nodes)


class Replacement:
    """Regions of a model, or of a copy of it, that become convolutions one after the other, in order."""

    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw
        self._renamed: dict[str, str] = {}

    def region(self, one: Candidate) -> Region:
        """That of a candidate; it may start where one before it ended."""
        named = {node.name: node for node in self.rw.graph.nodes}
        source = one.part.source.name
        part = region(self.rw, named[self._renamed.get(source, source)], named[one.part.target.name])
        assert isinstance(part, Region)
        return part

    def replace(self, part: Region, kernel: Kernel, xs: Sequence[Tensor] = ()) -> None:
        """Write the kernel in the place of a region.

        Args:
            xs: what it gets on calibration data; with them, it has a batch norm where the region had one.
        """
        path = common_path(part.steps, "merged")
        norm = norm_to_keep(part.nodes) if xs else None
        written = kernel if norm is None else replace(kernel, bias=None)
        made = emit(self.rw, written, part.source, part.steps, path, before=part.target)
        if norm is not None:
            made = normed(self.rw, made, kernel, xs, norm, before=part.target)
        self._renamed[part.target.name] = made.name
        self.rw.replace(part.target, made, f"one layer for {len(part.steps)}, fitted to what they make")
