"""Which branches of a model can be left out whole: residual blocks, attention, the MLP of a transformer layer.

A branch is an operand of an addition y = x + f(x), or y = s(z) + f(z): everything that makes the operand has one entry,
the nearest value through which all that the addition reads has come (its immediate dominator), and one exit, the
addition. Without the branch, y is the other operand. They are found by the flow of values and not by names or types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from graphopt.ops import Kind, argument, is_pure, lookup, shape
from graphopt.printer import module_path

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["Branch", "Stay", "branches"]


@dataclass(frozen=True, eq=False)
class Branch:
    """An operand of an addition, and all that only it needs.

    Attributes:
        name: the module that its layers have in common, or the one that makes most of them.
        add: the addition.
        operand: which of its operands is the branch, 0 or 1.
        entry: the value that it starts from.
        nodes: what makes the operand, in order; stored tensors that nothing else reads are part of it.
        layers: those of the nodes that have weights.
    """

    name: str
    add: Node
    operand: int
    entry: Node
    nodes: tuple[Node, ...]
    layers: tuple[Node, ...]


@dataclass(frozen=True)
class Stay:
    """Why what an addition adds is no branch that could go, and the calls with weights or attention that it is of."""

    why: str
    nodes: tuple[Node, ...]


def branches(model: Model, stays: dict[Node, Stay] | None = None) -> list[Branch]:
    """The branches of a model in evaluation mode, in order of their additions; of one addition at most one. They are
    nested in each other, or have no value in common.

    Args:
        stays: gets the additions that look as if they ended a branch with layers and do not.
    """
    flow, found = _Flow(model, {} if stays is None else stays), []
    taken: Counter[str] = Counter()
    for node in model.graph.nodes:
        branch = flow.branch(node)
        if branch is not None:
            taken[branch.name] += 1
            count = taken[branch.name]
            found.append(branch if count == 1 else replace(branch, name=f"{branch.name}#{count}"))
    return found


class _Flow:
    """The values of a model that come from its inputs, as a tree: each below its immediate dominator, the last value
    that all ways to it go through (Cooper, Harvey, Kennedy, A Simple, Fast Dominance Algorithm, 2001; without cycles
    one walk is enough). Sizes carry no values."""

    def __init__(self, model: Model, stays: dict[Node, Stay]) -> None:
        self.stays = stays
        self.place = {node: place for place, node in enumerate(model.graph.nodes)}
        self.above: dict[Node, Node | None] = {}
        self.level: dict[Node | None, int] = {None: 0}
        for node in self.place:
            sources = self.sources(node)
            if node.op == "placeholder" or sources:
                above = reduce(self._meet, sources) if sources else None
                self.above[node], self.level[node] = above, self.level[above] + 1

    def sources(self, node: Node) -> list[Node | None]:
        """What a call reads of the values that come from inputs."""
        return [] if _is_size(node) else [used for used in node.all_input_nodes if used in self.above]

    def _meet(self, a: Node | None, b: Node | None) -> Node | None:
        while a is not b:
            if self.level[a] < self.level[b]:
                a, b = b, a
            assert a is not None
            a = self.above[a]
        return a

    def branch(self, add: Node) -> Branch | None:
        """The branch that ends at a call, if that is an addition: of two the longer one."""
        entry, operands = self.above.get(add), _operands(add)
        if not operands or any(operand not in self.above for operand in operands):
            return None
        found, stays = [], []
        for place, (operand, kept) in enumerate((operands, operands[::-1])):
            nodes, stop = self._inside(add, operand, entry or kept)
            layers = tuple(node for node in nodes if _is_layer(node, self.above))
            why = self._refusal(stop, add, nodes) if stop else self._misfit(entry, kept, add)
            if layers and why is None:
                found.append((self._least(nodes, layers), len(layers), place, nodes, layers))
            elif layers and why is not None:
                stays.append(Stay(why, nodes))
        depth, _, place, nodes, layers = max(found, key=lambda one: one[:2], default=(0, 0, 0, (), ()))
        if depth:
            assert entry is not None
            return Branch(_name(layers), add, place, entry, nodes, layers)
        if stays:
            self.stays[add] = stays[0]
        return None

    def _inside(self, add: Node, operand: Node, entry: Node) -> tuple[tuple[Node, ...], Node | None]:
        """All that makes the operand from the entry, in order, or as much of it as was seen before something that may
        not go, and that."""
        inside: set[Node] = set()
        seen: set[Node] = set()
        waiting: list[tuple[int, Node]] = []
        stop = None

        def push(nodes: Iterable[Node]) -> None:
            for node in nodes:
                if node is not entry and node not in seen and not _is_size(node):
                    seen.add(node)
                    heappush(waiting, (-self.place[node], node))

        push([operand])
        while waiting and stop is None:  # later ones first: whoever reads a node was met before it
            _, node = heappop(waiting)
            goes = all((user is add and node is operand) or _vanishes(user, inside) for user in node.users)
            if goes and is_pure(node):
                inside.add(node)
                push(node.all_input_nodes)
            elif goes or node in self.above:
                stop = node
        return tuple(sorted(inside, key=self.place.__getitem__)), stop

    def _refusal(self, stop: Node, add: Node, inside: tuple[Node, ...]) -> str:
        """Why a value may not go."""
        if stop.op == "placeholder" or self.above.get(add) is None:
            return f"it reads '{stop.name}', which does not come from what it is added to"
        others = [user for user in stop.users if user is not add and not _vanishes(user, set(inside))]
        if others:
            return f"'{stop.name}', a part of it, is also used by '{others[0].name}'"
        return f"'{stop.name}' draws random numbers or changes statistics"

    def _misfit(self, entry: Node | None, kept: Node, add: Node) -> str | None:
        if _is_echo(kept, add):
            return f"without it an output would be the input '{kept.name}'"
        return "it has several entries" if entry is None else None

    def _least(self, nodes: tuple[Node, ...], layers: tuple[Node, ...]) -> int:
        """How many layers the shortest way through a branch has: what has none is no branch but the stream itself."""
        least: dict[Node, int] = {}
        counted = set(layers)
        for node in nodes:
            sources = [used for used in self.sources(node) if used is not None]
            if sources:
                least[node] = min(least.get(used, 0) for used in sources) + (node in counted)
        return least[nodes[-1]]


def _operands(node: Node) -> tuple[Node, ...]:
    """The two operands of a sum that are as large as it and of its dtype; none of anything else."""
    if node.target is not torch.ops.aten.add.Tensor or argument(node, "alpha") != 1:
        return ()
    found, made = (argument(node, "self"), argument(node, "other")), node.meta["val"]
    fits = all(
        isinstance(one, Node) and shape(one) == shape(made) and one.meta["val"].dtype == made.dtype for one in found
    )
    return found if fits and found[0] is not found[1] else ()


def _is_echo(kept: Node, add: Node) -> bool:
    """Whether an output would be an input of the model without the branch."""
    return kept.op == "placeholder" and any(user.op == "output" for user in add.users)


def _is_size(node: Node) -> bool:
    info = lookup(node.target) if node.op == "call_function" else None
    return info is not None and info.kind is Kind.SIZE


def _vanishes(user: Node, inside: set[Node]) -> bool:
    """Whether a reader goes with the branch: it is part of it, or a size that nothing else asks for."""
    return user in inside or (_is_size(user) and all(_vanishes(other, inside) for other in user.users))


def _is_layer(node: Node, values: dict[Node, Node | None]) -> bool:
    """Whether a call multiplies by something stored."""
    info = lookup(node.target)
    return (
        info is not None
        and info.kind in (Kind.CONTRACTION, Kind.RECURRENT)
        and any(used not in values and not _is_size(used) for used in node.all_input_nodes)
    )


def _name(layers: tuple[Node, ...]) -> str:
    paths = [module_path(node) or node.name for node in layers]
    common = ".".join(_common([path.split(".") for path in paths]))
    return common or Counter(paths).most_common(1)[0][0]


def _common(paths: list[list[str]]) -> Iterator[str]:
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            return
        yield parts[0]
