"""Removal of calls that return an input of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ops import shape
from graphopt.passes._facts import Facts
from graphopt.passes._identities import identity
from graphopt.passes._layout import relax_views
from graphopt.printer import operator_name
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Pass

__all__ = ["RemoveIdentity"]


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove operators that return one of their inputs unchanged.

    What:
        Dropout in evaluation; reshapes, permutations, slices, expansions, repetitions and pads that change nothing;
        copies (`contiguous`, `clone`) and casts to the dtype a tensor has; concatenations of one tensor and splits
        into one piece; adding 0, multiplying or dividing by 1, power 1; clamps of values that lie within the bounds
        already (`relu` after `relu`, `relu6` or `sigmoid`); pools and resamplings with windows of one element;
        a detach of what has no gradient.

    Algebra:
        f(x) = x for x [..] of any shape, with f(x) of the same shape, dtype and device as x. Operators that move
        elements in order are the identity as soon as the shape stays; permutations by their axes, casts by the
        dtype, arithmetic by its neutral element, clamps by bounds that are followed through the graph.

    When it applies:
        The call and the input it returns have equal shape (symbolic sizes equal as expressions), dtype, device and
        layout. A dropout is removed when its training flag is off; the model then has none when it is trained again,
        as after `fold-batch-norm` it has no batch norm. It leaves alone, with the reason: a detach that stops a
        gradient, a copy of a buffer that is written to, a copy in front of an unknown operator, x + 0.0 in a graph
        that tells 0.0 and -0.0 apart (1/x does), and anything that would change a dtype by promotion.

    Safety:
        Exact: the values stay the same bits, but that -0.0 may stay -0.0 where adding 0.0 or averaging one element
        made it 0.0, and nothing in the graph could see it. Gradients stay, but at the very bound of a clamp. After
        a copy has gone, a `view` that needed its order in memory becomes a `reshape`.

    Cost:
        Never more operators or bytes. One walk over the graph.

    Source:
        The neutral elements of arithmetic in IEEE 754-2019, section 6.3 for the sign of zero.

    Example:
        >>> import torch, graphopt as go
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.ReLU(), torch.nn.ReLU())
        >>> model = go.capture(net.eval(), (torch.randn(2, 4),))
        >>> smaller, (report,) = go.run(model, "remove-identity")
        >>> [edit.why for edit in report.edits]
        ['dropout returns its input', 'relu returns its input']
    """

    name: ClassVar[str] = "remove-identity"

    def run(self, rw: Rewriter) -> None:
        """Walk in order, so that what an identity returns is known to be final."""
        facts = Facts(rw)
        for node in rw.find():
            facts.visit(node)
            verdict = identity(node, facts)
            if isinstance(verdict, str):
                rw.skip(node, verdict)
            elif verdict is None or not _interchangeable(node, verdict, facts):
                continue
            elif verdict.op == "get_attr" and any(user.op == "output" for user in node.users):
                rw.skip(node, "it is an output, which would be the model's own tensor")
            else:
                rw.replace(node, verdict, f"{operator_name(node.target)} returns its input")
        if rw.changed:
            relax_views(rw)


def _interchangeable(node: Node, source: Node, facts: Facts) -> bool:
    return facts.same_kind(node, source) and shape(node) == shape(source)
