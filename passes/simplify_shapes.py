"""Fewer reshapes, permutations, expansions, slices and concatenations in a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphopt.fake import FakeTensor, ShapeError, shape_text
from graphopt.ops import Size, argument, arguments, lookup, rank, shape
from graphopt.ops.sizes import to_size
from graphopt.passes._facts import is_written
from graphopt.passes._layout import relax_views
from graphopt.passes._reindexing import COPIES, is_reshape, name_of, overloads, permutation
from graphopt.passes._renumbering import Plan, Renumbering, plan
from graphopt.printer import operator_name
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Pass

__all__ = ["SimplifyShapes"]

aten = torch.ops.aten

LONGEST = 12
"""Calls of a chain that are replaced together; a longer chain is shortened piece by piece."""

EXPANSIONS = overloads("expand expand_as broadcast_to")
JOINS = overloads("cat concat concatenate")


@dataclass(frozen=True)
class SimplifyShapes(Pass):
    """Replace chains of operators that only rearrange elements by the shortest chain that does the same.

    What:
        A chain of reshapes (`view`, `flatten`, `unflatten`, `squeeze`, `unsqueeze`, ..), permutations (`transpose`,
        `t`, `movedim`, ..) and copies (`contiguous`, `clone`) becomes at most a reshape, a permutation and a
        reshape, mostly less; a permutation that only moves axes of size one becomes a reshape. An expansion of an
        expansion, a slice of a slice along one axis, and a concatenation of concatenations along one axis become
        one call.

    Algebra:
        Number the elements of x [d0, d1, ..] in row-major order. Every axis of the result is a list of digits
        (size, stride) of that number. Reshapes join and split digits, permutations reorder axes:
        reshape(permute(reshape(x, [a, b, c]), [0, 2, 1]), [a, c * b]) has the digits (a, b * c); (c, 1), (b, c).
        Neighbours (m, s * n), (n, s) are one digit (m * n, s). One digit left: a reshape, or nothing.

    When it applies:
        The new chain is cheaper, a permutation counted twice since it moves memory, and does not have more calls.
        Values in between that others use stay and are passed by. Symbolic sizes are divided only where the division
        is exact as an expression; of several symbolic sizes each has to be computed somewhere before. Left alone,
        with the reason: chains in front of unknown operators, which may rely on strides, chains whose sizes nothing
        computes, and outputs that would become a tensor of the model itself. Axes of size zero end a chain, and so
        does squeezing an axis of free size, which drops the axis when the size happens to be one.

    Safety:
        Exact: elements move, none is computed. Every call made is a `reshape`, never a `view`; a `view` further down
        that needed the order in memory becomes a reshape too.

    Cost:
        Never more calls, bytes or permutations. Linear in the number of operators for chains of bounded length.

    Source:
        Mixed-radix index algebra, as in Graphene (Hagedorn et al., ASPLOS 2023) and CuTe's layouts.

    Example:
        >>> import torch, graphopt as go
        >>> class Shuffle(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.view(2, 2, 3, 4).transpose(1, 2).contiguous().view(2, 6, 4).unsqueeze(0).squeeze(0)
        >>> model = go.capture(Shuffle(), (torch.randn(2, 6, 4),))
        >>> smaller, (report,) = go.run(model, "simplify-shapes")
        >>> [edit.why for edit in report.edits]
        ["calls that rearrange 'x': 6 before, 3 now"]
    """

    name: ClassVar[str] = "simplify-shapes"

    def run(self, rw: Rewriter) -> None:
        """Walk until nothing changes: one chain that is shortened may leave a value of another to that one alone."""
        edits = -1
        while len(rw.edits) > edits and not rw.exhausted:
            edits = len(rw.edits)
            notes = _Notes()
            for node in rw.find():
                notes.visit(node)
                _simplify(rw, node, notes)
        for node, reason in notes.refused.items():
            rw.skip(node, reason)
        if rw.changed:
            relax_views(rw)


def _simplify(rw: Rewriter, node: Node, notes: _Notes) -> None:
    """A chain is dealt with at its end."""
    if _is_link(node):
        if not _goes_on(node):
            _shorten(rw, node, notes)
    elif name_of(node) in EXPANSIONS:
        _join_expansions(rw, node, notes)
    elif name_of(node) == "slice.Tensor":
        _join_slices(rw, node, notes)
    elif name_of(node) in JOINS:
        _join_joins(rw, node)


@dataclass
class _Notes:
    """Of one walk: which operator computes a symbolic size, and which nodes were left alone, and why."""

    computed: dict[Size, Node] = field(default_factory=dict)
    refused: dict[Node, str] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            known = self.computed.get(to_size(value))
            if known is None or known._erased:
                self.computed[to_size(value)] = node

    def written(self, size: Size) -> int | Node | None:
        """A size as an argument; None when nothing computes it."""
        if isinstance(size, int):
            return size
        known = self.computed.get(size)
        return None if known is None or known._erased else known

    def sizes(self, shape: tuple[Size, ...]) -> list[Any] | None:
        """A shape as an argument of reshape. A single free size is -1: what is left of a size of zero is zero."""
        if sum(not isinstance(size, int) for size in shape) == 1:
            return [size if isinstance(size, int) else -1 for size in shape]
        written = [self.written(size) for size in shape]
        return None if None in written else written


# Chains of reshapes, permutations and copies


def _is_link(node: Node) -> bool:
    if not is_reshape(node) and name_of(node) not in COPIES and permutation(node) is None:
        return False
    if not isinstance(node.meta.get("val"), FakeTensor) or 0 in shape(node):
        return False
    return not is_written(_source(node))


def _source(node: Node) -> Node:
    first = next(iter(arguments(node).values()))
    assert isinstance(first, Node)
    return first


def _goes_on(node: Node) -> bool:
    """Whether the only user continues the chain, so that its end is further down."""
    return len(node.users) == 1 and _is_link(next(iter(node.users)))


def _shorten(rw: Rewriter, end: Node, notes: _Notes) -> None:
    """Replace stretches of the chain that ends at `end` by cheaper ones until there is none."""
    chain, refused = _chain(end), set[tuple[Node, Node]]()
    start = 0
    while start < len(chain) and not rw.exhausted:
        stretch = _cheaper(chain, start, refused)
        if stretch is None:
            start += 1
            continue
        stop, found = stretch
        last = chain[stop]
        made = _rebuild(rw, _source(chain[start]), last, found, stop + 1 - start, notes)
        if made is None:
            refused.add((chain[start], last))
        else:
            chain[start : stop + 1] = made
            start = max(start - LONGEST, 0)


def _chain(end: Node) -> list[Node]:
    """The links up to `end`, first one first. Behind a value that others use too, only as many as one stretch has."""
    chain, spare = [end], LONGEST
    while spare and _is_link(_source(chain[-1])):
        chain.append(_source(chain[-1]))
        spare -= spare < LONGEST or len(chain[-1].users) > 1
    return chain[::-1]


def _cheaper(chain: list[Node], start: int, refused: set[tuple[Node, Node]]) -> tuple[int, Plan] | None:
    """Where the stretch from `start` with the largest gain stops, and what does the same."""
    best: tuple[int, Plan] | None = None
    most = 0
    what = Renumbering.identity(shape(_source(chain[start])))
    for stop in range(start, min(start + LONGEST, len(chain))):
        longer = _followed(what, chain[stop])
        if longer is None:
            break
        what = longer
        found = plan(what)
        gain = _given_up(chain[start : stop + 1]) - found.cost if found is not None else 0
        if found is not None and gain > 0 and gain >= most and (chain[start], chain[stop]) not in refused:
            best, most = (stop, found), gain
    return best


def _given_up(stretch: list[Node]) -> int:
    """The cost of the calls that go when the last of them is replaced: those before it that nothing else uses."""
    cost = 0
    for link in reversed(stretch):
        if link is not stretch[-1] and len(link.users) > 1:
            break
        cost += 1 if permutation(link) is None else 2
    return cost


def _followed(what: Renumbering, link: Node) -> Renumbering | None:
    order = permutation(link)
    if order is not None:
        return what.permuted(order)
    return what if name_of(link) in COPIES else what.reshaped(shape(link))


def _rebuild(rw: Rewriter, source: Node, end: Node, found: Plan, count: int, notes: _Notes) -> list[Node] | None:
    """Put the calls of `found` in place of `end`; None, and the reason noted, where that cannot be."""
    reason = _why_not(source, end, found)
    made: list[Node] = []
    value = source
    for op, sized in (
        (aten.reshape.default, found.split),
        (aten.permute.default, found.order),
        (aten.reshape.default, found.shape),
    ):
        if sized is None or reason is not None:
            continue
        written = notes.sizes(sized)
        if written is None:
            reason = f"nothing computes the free sizes of {_text(sized, rw)}"
            continue
        try:
            value = rw.call(op, value, written, before=end, like=end)
        except ShapeError as error:
            reason = str(error)
        else:
            made.append(value)
    if reason is None and shape_text(rw.value(value)) != shape_text(rw.value(end)):
        reason = f"its shape would be written {_text(shape(value), rw)}"
    if reason is not None:
        for node in reversed(made):
            rw.discard(node)
        notes.refused[end] = reason
        return None
    rw.replace(end, value, f"calls that rearrange '{source.name}': {count} before, {found.calls} now")
    return made


def _why_not(source: Node, end: Node, found: Plan) -> str | None:
    unknown = [u for u in end.users if u.op == "call_function" and lookup(u.target) is None]
    if unknown:
        return f"'{unknown[0].name}' is an unknown operator and may rely on the memory layout"
    if found.calls == 0 and source.op == "get_attr" and any(u.op == "output" for u in end.users):
        return "it is an output, which would be the model's own tensor"
    return None


def _text(sizes: tuple[Size, ...], rw: Rewriter) -> str:
    return f"[{', '.join(rw.model.shapes.name(size) for size in sizes)}]"


# Expansions, slices and concatenations


def _inner(node: Node, value: Any, names: frozenset[str]) -> Node | None:
    """`value` when it is a call of one of `names` that only `node` uses, once."""
    if not isinstance(value, Node) or name_of(value) not in names or list(value.users) != [node]:
        return None
    return value


def _join_expansions(rw: Rewriter, node: Node, notes: _Notes) -> None:
    inner = _inner(node, _source(node), EXPANSIONS)
    if inner is None:
        return
    source, target = shape(_source(inner)), shape(node)
    padded = (None,) * (len(target) - len(source)) + source
    written = [-1 if old == new else notes.written(new) for old, new in zip(padded, target, strict=True)]
    if None in written:
        notes.refused[node] = f"nothing computes the free sizes of {_text(target, rw)}"
        return
    call = rw.call(aten.expand.default, _source(inner), written, before=node, like=node)
    rw.replace(node, call, "an expansion of an expansion")


def _join_slices(rw: Rewriter, node: Node, notes: _Notes) -> None:
    inner = _inner(node, _source(node), frozenset(("slice.Tensor",)))
    if inner is None or argument(inner, "dim") % rank(node) != argument(node, "dim") % rank(node):
        return
    dim = argument(node, "dim") % rank(node)
    first, second, length = _range(inner, dim), _range(node, dim), shape(node)[dim]
    if first is None or second is None or not isinstance(length, int) or length == 0:
        notes.refused[node] = "a slice of a slice whose bounds are no numbers"
        return
    start, step = first[0] + second[0] * first[1], first[1] * second[1]
    end = start + (length - 1) * step + 1
    call = rw.call(aten.slice.Tensor, _source(inner), dim, start, end, step, before=node, like=node)
    rw.replace(node, call, "a slice of a slice")


def _range(node: Node, dim: int) -> tuple[int, int] | None:
    """Start, counted from the beginning, and step of a slice; None when they are no numbers."""
    size = shape(_source(node))[dim]
    start, step = argument(node, "start"), argument(node, "step")
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(step, int) or (start < 0 and not isinstance(size, int)):
        return None
    return max(start + int(size), 0) if start < 0 else start, step


def _join_joins(rw: Rewriter, node: Node) -> None:
    tensors = argument(node, "tensors")
    dim = argument(node, "dim") % max(rank(node), 1)
    flat: list[Node] = []
    for tensor in tensors:
        inner = _inner(node, tensor, JOINS)
        joins = inner is not None and tensors.count(tensor) == 1 and argument(inner, "dim") % max(rank(inner), 1) == dim
        flat += argument(tensor, "tensors") if joins else [tensor]
    if len(flat) > len(tensors):
        rw.update(node, f"{operator_name(node.target)} of concatenations along one axis", tensors=flat)
