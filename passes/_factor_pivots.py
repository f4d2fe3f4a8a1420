"""Two factors without what they have twice: some outputs are computed, and the others from these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.linalg import qr
from torch import Tensor

from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_forms import Form, Ranks
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Problem, Solver
from graphopt.passes._factor_writer import Writer, write_kernel
from graphopt.passes._kernel import Kernel
from graphopt.rewriter import Node

__all__ = ["Pivoted"]

aten = torch.ops.aten

_ROWS = 4096
"""Looked at together."""


@dataclass(frozen=True)
class Pivoted(Form):
    """A B of rank r [out, in * taps] as r of its rows, from which the other rows are made: with the rows in order,

        A B = [V; C V],  V = A_p B [r, in * taps],  C = A_n A_p^-1 [out - r, r],

    A_p the rows of A of the pivots, which a QR decomposition with column pivoting of A^T chooses, and A_n the others.
    That is r (out + in * taps - r) numbers in the place of r (out + in * taps), and never more than the layer has.
    (Zhao et al., Pivoting Factorization, ICML 2025.) The first layer computes the pivots, a second one without a window
    the others; both are put in order. Groups each by themselves.

    Attributes:
        of: what finds A and B; the second of its layers has no window.
    """

    of: Folded
    name: str = "pivoted"
    solvers: ClassVar[Sequence[Solver]] = ("svd", "activation", "fisher", "random")

    def why_not(self, whole: Whole) -> str | None:
        return self.of.why_not(whole) or ("its groups make one output each" if _outputs(whole) == 1 else None)

    def full(self, whole: Whole) -> Ranks:
        return self.of.full(whole)

    @property
    def is_direct(self) -> bool:
        return True

    def errors(self, problem: Problem, wanted: Sequence[Ranks]) -> list[float]:
        return self.of.errors(problem, wanted)

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        new, groups, (rank,) = whole.kernel.weight.new_empty, whole.groups, ranks
        rest = groups * (_outputs(whole) - rank)
        return [
            new(groups * rank, *whole.kernel.weight.shape[1:]),
            new(rest, rank, *(1 for _ in whole.kernel.size)),
            new(whole.kernel.outputs, dtype=torch.int64),
        ]

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        whole, (rank,) = problem.whole, ranks
        b, a = self.of.factors(problem, ranks)
        a, b = a.reshape(whole.groups, -1, rank), b.reshape(whole.groups, rank, -1)
        shapes = [factor.shape for factor in self.empty(whole, ranks)]
        mixed = a.new_empty(whole.groups, _outputs(whole) - rank, rank)
        pivots, others = [], []
        for group, rows in enumerate(a):
            first = _independent(rows, rank)
            last = torch.ones(len(rows), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
            pivots.append(first + group * len(rows))
            others.append(last + group * len(rows))
            b[group] = rows[first].double() @ b[group].double()
            for start in range(0, len(last), _ROWS):
                part = slice(start, start + _ROWS)
                mixed[group, part] = _combinations(rows[first], rows[last[part]])
        # Where an output is found behind both layers: the inverse of their order.
        order = torch.cat((*pivots, *others)).argsort()
        return [b.reshape(shapes[0]), mixed.reshape(shapes[1]), order]

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        first, second, order = factors
        rows = first.reshape(whole.groups, second.shape[1], -1)
        places = order.argsort()
        made = first.new_empty(whole.kernel.outputs, whole.columns)
        made[places[: len(first)]] = rows.flatten(0, 1)
        each = len(second) // whole.groups
        for group, pivots in enumerate(rows):
            for part in torch.arange(group * each, (group + 1) * each).split(_ROWS):
                made[places[len(first) + part]] = second[part].flatten(1) @ pivots
        return made.reshape(whole.kernel.weight.shape)

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        first, second, order = factors
        axes, k = whole.kernel.axes, whole.kernel
        axis = 1 if axes else len(whole.shape) - 1
        window = Kernel(first, None, k.stride, k.padding, k.dilation, k.groups)
        point = Kernel(second, None, (1,) * axes, ((0, 0),) * axes, (1,) * axes, k.groups)
        pivots = write_kernel(writer, writer.source, window, "0")
        others = write_kernel(writer, pivots, point, "1")
        both = writer.call(aten.cat.default, [pivots, others], axis)
        made = writer.call(aten.index_select.default, both, axis, writer.places("order", order))
        if writer.bias is None:
            return made
        bias = writer.bias
        if axes:
            bias = writer.call(aten.reshape.default, bias, [-1, *(1 for _ in range(axes))])
        return writer.call(aten.add.Tensor, made, bias)


def _independent(rows: Tensor, count: int) -> Tensor:
    """Which `count` rows [p, r] of all make the others with small numbers, in order: those that a QR decomposition of
    their transpose with column pivoting takes first. Of very many rows a few from every part play against each other.
    (Demmel, Grigori, Gu and Xiang, Communication Avoiding Rank Revealing QR Factorization with Column Pivoting, 2015.)
    """
    left, width = torch.arange(len(rows)), max(_ROWS, 2 * count)
    while len(left) > width:
        left = torch.cat([part[_first_pivots(rows[part], count)] for part in left.split(width)])
    return left[_first_pivots(rows[left], count)].sort().values


def _first_pivots(rows: Tensor, count: int) -> Tensor:
    order = qr(rows.T.double().numpy(), mode="r", pivoting=True, overwrite_a=True)[1]
    return torch.from_numpy(order[:count].astype("int64"))


def _combinations(pivots: Tensor, rows: Tensor) -> Tensor:
    """Of the pivots [r, r] that rows [n, r] are: [n, r], in their dtype."""
    found: Tensor = torch.linalg.lstsq(pivots.double().T, rows.double().T).solution
    return found.T.to(rows.dtype)


def _outputs(whole: Whole) -> int:
    """Of one group."""
    return whole.kernel.outputs // whole.groups
