"""Removal of what no output needs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.mode import is_running_statistic
from graphopt.ops import argument, arguments, is_pure, is_training, lookup
from graphopt.passes._reindexing import SPLITS, name_of
from graphopt.printer import operator_name
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Pass

__all__ = ["DeadCode"]

aten = torch.ops.aten

WITHOUT_INDICES: dict[Any, Any] = {
    aten.max_pool1d_with_indices.default: aten.max_pool1d.default,
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d.default,
}
EXTREMES = (aten.max.dim, aten.min.dim)


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove operators and outputs of operators that no output of the model needs.

    What:
        Operators nobody uses, together with the tensors only they used. A split, chunk or unbind of which some
        pieces are unused becomes one slice or select for each piece that is used; a pool that also returns
        unused indices becomes the pool that does not.

    Algebra:
        split(x, [s0, s1, ..], axis)[i] = slice(x, axis, s0 + .. + s(i-1), s0 + .. + si) for x [.., s0 + s1 + .., ..];
        unbind(x, axis)[i] = select(x, axis, i).

    When it applies:
        The operator is pure, or draws random numbers that no later operator's numbers depend on. Pieces before a
        used one have sizes that are numbers. Left alone, with the reason: operators that update running statistics,
        operators outside the table, which may have an effect of their own, and maxima along an axis whose indices
        are unused (`amax` spreads the gradient over equal maxima). Inputs, and the tensors in the state dict of the
        user that no operator uses (`model.kept`), stay.

    Safety:
        Exact: what remains computes the same bits and draws the same random numbers.

    Cost:
        Never more operators, bytes or multiplications. One walk over the graph, backwards.

    Source:
        Dead-code elimination as in Aho, Lam, Sethi, Ullman, Compilers (2nd edition), section 9.1.6.

    Example:
        >>> import torch, graphopt as go
        >>> class FirstHalf(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.chunk(2, dim=1)[0].relu()
        >>> model = go.capture(FirstHalf(), (torch.randn(2, 6),))
        >>> smaller, (report,) = go.run(model, "dead-code")
        >>> [edit.why for edit in report.edits]
        ['1 of 2 pieces of chunk is used']
    """

    name: ClassVar[str] = "dead-code"

    def run(self, rw: Rewriter) -> None:
        """Walk backwards: what only dead operators used is dead when it is met."""
        draws_later = False
        for node in reversed(list(rw.find())):
            if rw.exhausted:
                return
            if node._erased:
                continue
            if not node.users:
                _remove_unused(rw, node, draws_later)
            elif name_of(node) in SPLITS or node.target is aten.unbind.int:
                _keep_used_pieces(rw, node)
            elif node.target in WITHOUT_INDICES:
                _drop_indices(rw, node)
            elif node.target in EXTREMES and _used_outputs(node) == {0}:
                rw.skip(node, "its indices are unused, but amax and amin spread the gradient over equal elements")
            draws_later = draws_later or (not node._erased and _draws(node))


def _draws(node: Node) -> bool:
    """Whether the operator may draw random numbers: an unknown one may."""
    info = lookup(node.target)
    return info is None or (not is_pure(node) and not info.stateful)


def _remove_unused(rw: Rewriter, node: Node, draws_later: bool) -> None:
    info = lookup(node.target)
    if is_running_statistic(node):
        return
    if info is None:
        rw.skip(node, f"nothing uses it, but '{operator_name(node.target)}' is unknown and may have an effect")
    elif info.stateful and is_training(node):
        rw.skip(node, "nothing uses it, but it updates running statistics")
    elif not is_pure(node) and draws_later:
        rw.skip(node, "nothing uses it, but operators after it would draw other random numbers")
    else:
        rw.erase(node, "nothing uses it")


def _used_outputs(node: Node) -> set[int] | None:
    """Which outputs of an operator with several are used; None when it is used other than by indexing."""
    if not all(user.target is operator.getitem for user in node.users):
        return None
    return {int(_index(user)) for user in node.users}


def _index(getitem: Node) -> Any:
    return getitem.args[1]


def _keep_used_pieces(rw: Rewriter, node: Node) -> None:
    pieces = rw.value(node)
    used = _used_outputs(node)
    if used is None or len(used) == len(pieces):
        return
    dim = int(argument(node, "dim"))
    is_unbind = node.target is aten.unbind.int
    sizes = [1 if is_unbind else piece.shape[dim] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes[: max(used) + 1]):
        rw.skip(node, f"{len(used)} of {len(pieces)} pieces are used, but where they start depends on a free size")
        return
    source = next(iter(arguments(node).values()))
    verb = "is" if len(used) == 1 else "are"
    why = f"{len(used)} of {len(pieces)} pieces of {operator_name(node.target)} {verb} used"
    for user in list(node.users):
        start = sum(sizes[: _index(user)])
        if is_unbind:
            piece = rw.call(aten.select.int, source, dim, start, before=user, like=node)
        else:
            end = start + sizes[_index(user)]
            piece = rw.call(aten.slice.Tensor, source, dim, start, end, before=user, like=node)
        rw.replace(user, piece, why)


def _drop_indices(rw: Rewriter, node: Node) -> None:
    if _used_outputs(node) != {0}:
        return
    pool = rw.call(WITHOUT_INDICES[node.target], **arguments(node), before=node, like=node)
    for user in list(node.users):
        rw.replace(user, pool, "the indices of the maxima are unused")
