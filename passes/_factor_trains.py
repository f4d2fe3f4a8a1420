"""Tensor trains: matrices whose axes are split, as a chain of small cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.passes._factor_decompositions import train
from graphopt.passes._factor_forms import Form, Ranks
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Problem, Solver, nearest_decoder
from graphopt.passes._factor_writer import Writer
from graphopt.rewriter import Node

__all__ = ["Train", "TrainOfRows", "split"]

aten = torch.ops.aten


def split(number: int, count: int) -> tuple[int, ...] | None:
    """`number` as a product of `count` numbers above 1, as equal as its divisors allow; None where there is none."""
    if count == 1:
        return (number,) if number > 1 else None
    wanted = number ** (1 / count)
    for first in sorted(range(2, number // 2 + 1), key=lambda one: abs(math.log(one / wanted))):
        rest = split(number // first, count - 1) if number % first == 0 else None
        if rest is not None:
            return (first, *rest)
    return None


@dataclass(frozen=True)
class Train(Form):
    """A linear layer as a chain of cores: W [out, in] with out = o_1 .. o_d and in = i_1 .. i_d,

        W[(o_1 .. o_d), (i_1 .. i_d)] = G_1[o_1, i_1] G_2[o_2, i_2] .. G_d[o_d, i_d], G_k [r_k-1, o_k, i_k, r_k].

    Each core is a linear layer on one of the axes, the last one first. (Novikov et al., Tensorizing Neural Networks,
    NeurIPS 2015.) In the measure of the data G_1 is the nearest one to all others.
    """

    name: str = "tt"
    cores: int = 2
    solvers: ClassVar[Sequence[Solver]] = ("svd", "activation", "fisher")

    def why_not(self, whole: Whole) -> str | None:
        if whole.embedding or whole.kernel.axes:
            return "it is no linear layer"
        out, inputs = whole.kernel.weight.shape
        for size in (out, inputs):
            if split(size, self.cores) is None:
                return f"{size} is no product of {self.cores} numbers"
        return None

    def full(self, whole: Whole) -> Ranks:
        sizes = [o * i for o, i in self._sizes(whole)]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, self.cores))

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        ends = (1, *ranks, 1)
        pairs = enumerate(self._sizes(whole))
        made = [whole.kernel.weight.new_empty(o * ends[k], i * ends[k + 1]) for k, (o, i) in pairs]
        return made[::-1]

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        sizes = self._sizes(problem.whole)
        shape = [o for o, _ in sizes] + [i for _, i in sizes]
        cores = train(problem.weight.reshape(shape), ranks)
        found = [core.movedim(0, 1).flatten(2).flatten(0, 1) for core in cores]  # [(o r), (i r')]
        if problem.is_aware:
            found[0] = self._first(problem, found)
        return found[::-1]

    def _first(self, problem: Problem, cores: Sequence[Tensor]) -> Tensor:
        """G_1 [o_1, (i_1 r)], by least squares: what it reads is one row for each output of the others."""
        (o, i), rest = self._sizes(problem.whole)[0], self._rest(problem.whole, cores)  # [r, o', i']
        assert problem.moments is not None
        rank, others, width = rest.shape
        side = problem.moments[0].reshape(i, width, i * width)
        read = torch.einsum("rox,ixn->oirn", rest, side).flatten(1, 2)  # [o', (i r), n]
        gram = torch.einsum("oajy,soy->ajs", read.unflatten(2, (i, width)), rest).reshape(i * rank, i * rank)
        cross = torch.einsum("pon,oan->pa", problem.weight.reshape(o, others, -1), read)
        return nearest_decoder(cores[0], cross, gram)

    def _rest(self, whole: Whole, cores: Sequence[Tensor]) -> Tensor:
        """All cores but the first one: [r, out / o_1, in / i_1]."""
        sizes = self._sizes(whole)
        made = cores[-1].new_ones(1, 1, 1)  # [r', out, in]
        for (o, i), core in zip(sizes[:0:-1], cores[:0:-1], strict=True):
            wide = core.reshape(o, -1, i, made.shape[0])
            made = torch.einsum("orix,xpq->ropiq", wide, made).flatten(3).flatten(1, 2)
        return made

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        cores, ((o, i), *_) = factors[::-1], self._sizes(whole)
        rest = self._rest(whole, cores)
        made = torch.einsum("oir,rpq->opiq", cores[0].reshape(o, i, -1), rest)
        return made.reshape(whole.kernel.weight.shape)

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        """The value is [.., i_1, .., i_k-1, outputs so far, (i_k r_k)] when core k is applied to it."""
        sizes = self._sizes(whole)
        lead = len(whole.shape) - 1
        made = writer.call(aten.unflatten.int, writer.source, -1, [i for _, i in sizes])
        # One output so far: an axis of one, in front of the last.
        made = writer.call(aten.unsqueeze.default, made, -2)
        for place, weight in enumerate(factors):
            k = len(sizes) - 1 - place
            made = writer.call(aten.linear.default, made, writer.tensor(f"{place}.weight", weight), None)
            if k == 0:
                made = writer.call(aten.flatten.using_ints, writer.call(aten.transpose.int, made, -1, -2), -2, -1)
                break
            made = writer.call(aten.unflatten.int, made, -1, [sizes[k][0], weight.shape[0] // sizes[k][0]])
            start = lead + k - 1  # [leading, i_1 .. i_k-1, outputs, o_k, r]: the next core reads i_k-1 and r
            order = [*range(start), start + 2, start + 1, start, start + 3]
            made = writer.call(aten.permute.default, made, order)
            made = writer.call(aten.flatten.using_ints, made, start, start + 1)
            made = writer.call(aten.flatten.using_ints, made, -2, -1)
        return made if writer.bias is None else writer.call(aten.add.Tensor, made, writer.bias)

    def _sizes(self, whole: Whole) -> list[tuple[int, int]]:
        """(o_k, i_k) of every core."""
        out, inputs = whole.kernel.weight.shape
        return list(zip(split(out, self.cores) or (), split(inputs, self.cores) or (), strict=True))


@dataclass(frozen=True)
class TrainOfRows(Form):
    """An embedding as two tables: entry (n_1 n_2) of W [entries, features] is the product of a row of each.

    W[(n_1 n_2), (d_1 d_2)] = G_1[n_1, d_1] G_2[n_2, d_2], G_1 [n_1, d_1 r], G_2 [n_2, r d_2]. (Hrinchuk et al.,
    Tensorized Embedding Layers, EMNLP 2020.) In the measure of the data G_1 is the nearest one to G_2.
    """

    name: str = "tt"
    solvers: ClassVar[Sequence[Solver]] = ("svd", "activation", "fisher")

    def why_not(self, whole: Whole) -> str | None:
        if not whole.embedding:
            return "it is no embedding"
        entries, features = whole.kernel.weight.shape
        if split(features, 2) is None or entries < 4:
            return f"{entries} x {features} cannot be split in two"
        return None

    def full(self, whole: Whole) -> Ranks:
        (n1, d1), (n2, d2) = self._sizes(whole)
        return (min(n1 * d1, n2 * d2),)

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        (n1, d1), (n2, d2) = self._sizes(whole)
        new = whole.kernel.weight.new_empty
        return [new(n1, d1 * ranks[0]), new(n2, ranks[0] * d2)]

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        (n1, d1), (n2, d2) = self._sizes(problem.whole)
        padded = problem.weight.new_zeros(n1 * n2, d1 * d2)
        padded[: len(problem.weight)] = problem.weight
        first, second = train(padded.reshape(n1, n2, d1, d2), ranks)
        g1, g2 = first[0].flatten(1), second[..., 0].movedim(0, 1)  # [n_1, (d_1 r)], [n_2, r, d_2]
        if problem.is_aware and problem.moments is not None:
            counts = problem.moments.new_zeros(n1 * n2)
            counts[: len(problem.moments)] = problem.moments
            weighed = counts.reshape(n1, n2)
            gram = torch.einsum("an,nrd,nsd->ars", weighed, g2, g2)
            cross = torch.einsum("an,anpd,nrd->apr", weighed, padded.reshape(n1, n2, d1, d2), g2)
            g1 = nearest_decoder(g1.reshape(n1, d1, -1), cross, gram).flatten(1)
        return [g1, g2.flatten(1)]

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        (n1, d1), (n2, d2) = self._sizes(whole)
        g1, g2 = factors[0].reshape(n1, d1, -1), factors[1].reshape(n2, -1, d2)
        made = torch.einsum("apr,nrd->anpd", g1, g2).reshape(n1 * n2, d1 * d2)
        return made[: whole.kernel.weight.shape[0]]

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        (_, d1), (n2, d2) = self._sizes(whole)
        rank = factors[0].shape[1] // d1
        quotient = writer.call(aten.floor_divide.Scalar, writer.source, n2)
        rest = writer.call(aten.remainder.Scalar, writer.source, n2)
        left = writer.call(aten.embedding.default, writer.tensor("0.weight", factors[0]), quotient)
        right = writer.call(aten.embedding.default, writer.tensor("1.weight", factors[1]), rest)
        left = writer.call(aten.unflatten.int, left, -1, [d1, rank])
        right = writer.call(aten.unflatten.int, right, -1, [rank, d2])
        return writer.call(aten.flatten.using_ints, writer.call(aten.matmul.default, left, right), -2, -1)

    def _sizes(self, whole: Whole) -> list[tuple[int, int]]:
        """(n_k, d_k) of both; there may be more pairs than entries."""
        entries, features = whole.kernel.weight.shape
        n1 = math.isqrt(entries - 1) + 1
        d1, d2 = split(features, 2) or (1, features)
        return [(n1, d1), (-(-entries // n1), d2)]
