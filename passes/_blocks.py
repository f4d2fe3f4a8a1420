"""Blocks that a model can do without: residual blocks, and transformer layers of two branches that follow each other.

What a block is follows from the flow of values and not from types: a branch is an operand of a sum (see
`graphopt.analysis.branches`). One that attends, which weighs values by a softmax of products of values, and the branch
right behind it, which does not, are a transformer layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphopt.analysis.branches import Branch, Stay, branches
from graphopt.errors import UsageError
from graphopt.model import Model, output_leaves
from graphopt.names import nearest
from graphopt.ops import Kind, lookup
from graphopt.passes._branches import erase
from graphopt.rewriter import Node, Rewriter

__all__ = ["Block", "find_blocks", "named", "outermost", "why_needed", "without"]

_FAR = 64
"""How many calls a sum is looked for behind the start of a branch, and products before a softmax."""


@dataclass(frozen=True, eq=False)
class Block:
    """Branches that go together, in order of the graph.

    Attributes:
        name: the module that they have in common.
    """

    name: str
    branches: tuple[Branch, ...]

    @property
    def nodes(self) -> set[Node]:
        """Everything that goes with it, the sums themselves left out."""
        return {node for branch in self.branches for node in branch.nodes}


def find_blocks(rw: Rewriter, unit: str) -> list[Block]:
    """The blocks of a model in evaluation mode, in order; sums that look as if they ended one are skipped with the
    reason.

    Args:
        unit: `branch` for every branch by itself, `layer` for attention together with the branch behind it.
    """
    stays: dict[Node, Stay] = {}
    found = branches(rw.model, stays)
    for add, stay in stays.items():
        rw.skip(add, f"what it adds stays: {stay.why}")
    if unit == "branch":
        return [Block(branch.name, (branch,)) for branch in found]
    taken: Counter[str] = Counter()
    blocks = []
    for group in _layers(rw, found, stays):
        name = _common([branch.name for branch in group])
        taken[name] += 1
        blocks.append(Block(name if taken[name] == 1 else f"{name}#{taken[name]}", group))
    return blocks


def _layers(rw: Rewriter, found: Sequence[Branch], stays: dict[Node, Stay]) -> Iterator[tuple[Branch, ...]]:
    """Attention with the branch behind it, and other branches alone. What is behind attention that stays, stays."""
    ends = {branch.add: branch for branch in found}
    attends = {branch.add: _attends(branch.nodes) for branch in found}
    attends |= {add: _attends(stay.nodes) for add, stay in stays.items()}
    before = {branch: _sum_before(branch, set(attends)) for branch in found}
    behind = {before[branch]: branch for branch in reversed(found) if not attends[branch.add]}
    for branch in found:
        source = before[branch]
        if attends[branch.add]:
            second = behind.get(branch.add)
            yield (branch,) if second is None else (branch, second)
        elif source is None or not attends[source] or behind[source] is not branch:
            yield (branch,)
        elif source not in ends:
            why = "the attention before it stays, and unit=layer takes both or neither"
            rw.skip(branch.add, f"branch '{branch.name}' stays: {why}")


def _sum_before(branch: Branch, sums: set[Node]) -> Node | None:
    """The sum whose result a branch starts from, if no layer stands between them."""
    node = branch.entry
    for _ in range(_FAR):
        info = lookup(node.target) if node.op == "call_function" else None
        if node in sums or info is None or info.kind in (Kind.CONTRACTION, Kind.RECURRENT, Kind.ATTENTION):
            break
        sources = [used for used in node.all_input_nodes if used.op != "get_attr" and not _is_size(used)]
        if len(sources) != 1:
            break
        node = sources[0]
    return node if node in sums else None


def _is_size(node: Node) -> bool:
    info = lookup(node.target) if node.op == "call_function" else None
    return info is not None and info.kind is Kind.SIZE


def _attends(nodes: Sequence[Node]) -> bool:
    """Whether values are weighed by a softmax of products of values."""
    inside = set(nodes)
    for node in nodes:
        info = lookup(node.target)
        if info is not None and (
            info.kind is Kind.ATTENTION or (info.kind is Kind.SOFTMAX and _is_of_products(node, inside))
        ):
            return True
    return False


def _is_of_products(softmax: Node, inside: set[Node]) -> bool:
    waiting, seen = list(softmax.all_input_nodes), 0
    while waiting and seen < _FAR:
        node, seen = waiting.pop(), seen + 1
        info = lookup(node.target) if node in inside else None
        if info is None:
            continue
        if info.kind is Kind.CONTRACTION:
            return all(used.op != "get_attr" for used in node.all_input_nodes)
        if info.kind in (Kind.ELEMENTWISE, Kind.MOVEMENT):
            waiting += node.all_input_nodes
    return False


def _common(names: Sequence[str]) -> str:
    """The module that all are in; the first of them where there is none."""
    common = []
    for parts in zip(*(name.partition("#")[0].split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or names[0]


def named(blocks: Sequence[Block], only: Sequence[str], leave: Sequence[str]) -> list[Block]:
    """Those blocks that are, or are in, one of the modules `only`, if any are given, and none of `leave`.

    Raises:
        UsageError: when a name is that of no block.
    """

    def meant(name: str) -> set[str]:
        found = {
            block.name
            for block in blocks
            for one in (block.name, *(branch.name for branch in block.branches))
            if one == name or one.startswith((f"{name}.", f"{name}#"))
        }
        if not found:
            known = [block.name for block in blocks]
            raise UsageError(
                f"no block is called '{name}'",
                why=None if known else "the model has no block that could go",
                todo=nearest(name, known) if known else "leave the option out",
            )
        return found

    wanted = {one for name in only for one in meant(name)} or {block.name for block in blocks}
    left = {one for name in leave for one in meant(name)}
    return [block for block in blocks if block.name in wanted - left]


def outermost(blocks: Sequence[Block]) -> list[Block]:
    """Blocks without those that are inside of another one."""
    return [
        block
        for block in blocks
        if not any(block is not other and block.branches[0].add in other.nodes for other in blocks)
    ]


def without(model: Model, gone: Sequence[Block]) -> Model:
    """A copy that shares its tensors with the model and has lost blocks, of which none is inside of another one."""
    copy = model.clone(share_tensors=True)
    if gone:
        erase(Rewriter(copy), [branch for block in gone for branch in block.branches])
    return copy


def why_needed(model: Model) -> str | None:
    """Why a model that has lost blocks is none any more."""
    for leaf in output_leaves(model.graph):
        if isinstance(leaf, Node) and leaf.op == "placeholder":
            return f"without it an output would be the input '{leaf.name}'"
    if not any(True for _ in model.parameters()):
        return "without it nothing that has weights would be left"
    return None
