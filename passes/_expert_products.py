"""Mixtures whose experts are stacked in tensors [experts, ...], all computed, and weighted by gates [..., experts]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graphopt.check import Oracle
from graphopt.errors import GraphoptError
from graphopt.ops import Kind, lookup
from graphopt.params import ParamKind
from graphopt.passes._expert_stacks import Stacks, between
from graphopt.passes._experts import Aligned
from graphopt.passes._mixtures import common_module, why_fixed
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract

__all__ = ["ComputedStacks", "computed_stacks"]

aten = torch.ops.aten
_FAR = 8
"""How many calls lie between gates and where they weight what the experts make."""


class ComputedStacks(Stacks):
    """Experts that are all computed by products with stacks.

    `mix` is the first call of what the experts make and of the router; `path` leads from the gates to it.
    """

    def __init__(self, stacks: list[Node], router: Node, mix: Node, path: list[Node], place: dict[Node, int]) -> None:
        self.logits, self.mix, self.path, self.routed, self.at = router, mix, path, path[0], mix
        self.count, self.stacks = int(stacks[0].meta["val"].shape[0]), stacks
        changed = _descendants(stacks, place)
        self.after = [node for node in place if node in changed]
        (made,) = (used for used in mix.all_input_nodes if used in changed)
        self.cone, self.ends = between([user for stack in stacks for user in stack.users], made, place), [made]
        self.name = common_module([str(stack.target) for stack in stacks]) or self.at.name

    def uses(self, routed: Tensor) -> Tensor:
        return routed.double().abs().reshape(-1, self.count).sum(0)

    def merge(self, rw: Rewriter, aligned: Aligned) -> None:
        """The gates of a group are added up by a product with a table [experts, groups]."""
        named = {node.name: node for node in rw.graph.nodes}
        groups = "; ".join(", ".join(map(str, sorted(group))) for group in aligned.groups)
        why = f"the experts of '{self.name}' are {len(aligned.groups)}: {groups}"
        gates, mix = named[self.routed.name], named[self.mix.name]
        table = torch.zeros(self.count, len(aligned.groups))
        table[range(self.count), aligned.place(self.count)] = 1.0
        name = f"{self.name}.merged" if self.name != self.at.name else "merged"
        fake = gates.meta["val"]
        member = rw.add_tensor(name, table.to(fake.device, fake.dtype), kind=ParamKind.BUFFER, like=mix)
        for stack, tensors in zip(self.stacks, zip(*aligned.merged, strict=True), strict=True):
            rw.set_tensor(named[stack.name], torch.stack(list(tensors)), why)
        after = [named[node.name] for node in self.after]
        before = after[: after.index(mix)]
        for node in before:
            rw.refresh(node)
        made = rw.call(aten.matmul.default, gates, member, before=mix)
        for old in self.path[1:]:
            step = named[old.name]
            args = [made if arg is named[self._source(old).name] else arg for arg in step.args]
            made = rw.call(step.target, *args, before=mix, **step.kwargs)
        rw.replace_input(mix, named[self.path[-1].name], made, why)
        for node in after[after.index(mix) + 1 :]:
            rw.refresh(node)

    def _source(self, node: Node) -> Node:
        return self.path[self.path.index(node) - 1]

    def why_not(self, rw: Rewriter) -> str | None:
        """Why there cannot be fewer experts. It is tried on a copy, with one group less than there are experts, against
        the model with all of them that way."""
        for stack in self.stacks:
            why = why_fixed(rw, stack, next(iter(stack.users)))
            if why is not None:
                return why
        experts = self.experts(rw.model)
        groups = ((0, self.count - 1), *((expert,) for expert in range(1, self.count - 1)))
        fewer = Aligned(groups, tuple(experts[group[0]] for group in groups))
        full, copy = (rw.model.clone(share_tensors=True) for _ in range(2))
        for name, tensor in self.with_experts(full, [*experts[:-1], experts[0]]).items():
            full.params.set(name, tensor)
        try:
            self.merge(Rewriter(copy), fewer)
            copy.touch()
            Oracle(full, rw.calib[:1]).judge(copy, Contract.EXACT)
        except (GraphoptError, RuntimeError) as error:
            return f"with fewer experts it would fail: {str(error).splitlines()[0]}"
        return None


def computed_stacks(rw: Rewriter) -> Iterator[ComputedStacks]:
    """The mixtures of a model whose stacked experts are all computed; what looks like one and is none is skipped."""
    place = {node: place for place, node in enumerate(rw.graph.nodes)}
    taken: set[Node] = set()
    for stack in [node for node in place if _is_read_by_product(node)]:
        if stack in taken:
            continue
        count = int(stack.meta["val"].shape[0])
        made = _descendants([stack], place)
        for router in [node for node in place if _is_router(node, count) and node not in made]:
            mixture = _mixture(router, made, place, taken)
            if mixture is None or stack not in mixture.stacks:
                continue
            taken |= set(mixture.stacks)
            why = mixture.why_not(rw)
            if why is None:
                yield mixture
            else:
                rw.skip(mixture.at, f"no mixture of experts: {why}")
            break
        else:
            rw.skip(stack, f"no mixture of experts: no router weights what '{stack.target}' makes")


def _mixture(router: Node, made: set[Node], place: dict[Node, int], taken: set[Node]) -> ComputedStacks | None:
    """The mixture whose results, which are among `made`, a router weights."""
    gates = _descendants([router], place) | {router}
    mix = next((node for node in place if node in gates and node in made), None)
    if mix is None:
        return None
    weights = [used for used in mix.all_input_nodes if used in gates]
    results = [used for used in mix.all_input_nodes if used in made]
    if len(weights) != 1 or len(results) != 1:
        return None
    count, path = _last(router), [weights[0]]
    while _last(path[0]) != count and len(path) < _FAR:
        sources = [used for used in path[0].all_input_nodes if used in gates]
        info = lookup(path[0].target)
        if len(sources) != 1 or info is None or info.kind is not Kind.MOVEMENT:
            return None
        path.insert(0, sources[0])
    stacks = _stacks(results[0], count, place, taken)
    return ComputedStacks(stacks, router, mix, path, place) if _last(path[0]) == count and stacks else None


def _stacks(made: Node, count: int, place: dict[Node, int], taken: set[Node]) -> list[Node]:
    """The stored tensors of the experts that make a value: products read them, or they are added to such products."""
    behind = _ancestors(made)
    stored = [node for node in behind if node.op == "get_attr" and node not in taken and _is_stack(node, count)]
    products = [node for node in stored if _is_read_by_product(node)]
    inside = _descendants(products, place)
    found = {node for node in stored if node in products or all(_meets(user, inside) for user in node.users)}
    return sorted(found, key=lambda node: min(place[user] for user in node.users))


def _meets(user: Node, inside: set[Node]) -> bool:
    """Whether a call is inside, or moves something towards what is."""
    info = lookup(user.target) if user.op == "call_function" else None
    moves = info is not None and info.kind is Kind.MOVEMENT
    return user in inside or (moves and all(_meets(other, inside) for other in user.users))


def _last(node: Node) -> int:
    """The size of the last axis; -1 where that is free."""
    value = node.meta["val"]
    size = value.shape[-1] if isinstance(value, Tensor) and value.dim() else None
    return size if isinstance(size, int) else -1


def _is_read_by_product(node: Node) -> bool:
    """Whether a stored tensor [n, ., .] is an operand of a product, as it is or moved."""
    if node.op != "get_attr" or node.meta["val"].dim() != 3 or node.meta["val"].shape[0] < 2:
        return False
    users = list(node.users)
    for _ in range(_FAR):
        infos = [lookup(user.target) if user.op == "call_function" else None for user in users]
        if any(info is not None and info.kind is Kind.CONTRACTION for info in infos):
            return "conv" not in str(users[0].target)
        users = [
            other
            for user, info in zip(users, infos, strict=True)
            if info is not None and info.kind is Kind.MOVEMENT
            for other in user.users
        ]
    return False


def _is_router(node: Node, count: int) -> bool:
    info = lookup(node.target) if node.op == "call_function" else None
    if info is None or info.kind is not Kind.CONTRACTION:
        return False
    return _last(node) == count and any(used.op == "get_attr" for used in node.all_input_nodes)


def _is_stack(node: Node, count: int) -> bool:
    value = node.meta["val"]
    return bool(value.dim() >= 2 and value.shape[0] == count and value.is_floating_point())


def _ancestors(node: Node) -> set[Node]:
    found, waiting = {node}, [node]
    while waiting:
        for used in waiting.pop().all_input_nodes:
            if used not in found:
                found.add(used)
                waiting.append(used)
    return found


def _descendants(nodes: Sequence[Node], place: dict[Node, int]) -> set[Node]:
    found = set(nodes)
    for node in place:
        if node.op == "call_function" and any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found - set(nodes)
