"""Two layers in the place of one, from its weight folded to a matrix."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.passes._factor_forms import Form, Ranks
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Problem, basis, nearest_decoder, product, semi_nonnegative, squares
from graphopt.passes._factor_writer import Writer, write_kernel
from graphopt.passes._kernel import Kernel
from graphopt.rewriter import Node

__all__ = ["Folded"]

_COLUMNS = 256
"""Of a basis at a time."""


@dataclass(frozen=True)
class Folded(Form):
    """Two layers, from a weight folded to a matrix: W [out, in, *k] = A [out * taps', r] B [r, in * taps].

    The first layer B slides along some of the axes, with their taps, stride, padding and dilation, the second one A
    along the others: all and none (a window, then 1x1), one and the other (1 x k, then k x 1), none and all (1x1, then
    a window). A linear layer has no axes. Groups of the layer are factorised each by itself. With `parts` the inputs
    of a group are divided further: the first layer has as many groups, of r outputs each, and the second one reads all.
    (Liebenwein et al., Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition, NeurIPS
    2021.)

    Attributes:
        first: the axes that the first layer slides along; None for all of them.
        matrix: whether it is for linear layers, or for convolutions.
    """

    name: str
    first: tuple[int, ...] | None = None
    parts: int = 1
    matrix: bool = False

    @property
    def is_direct(self) -> bool:
        return self.first is None and self.parts == 1

    def why_not(self, whole: Whole) -> str | None:
        taps = whole.kernel.size
        if whole.embedding:
            return "it looks rows up"
        if self.matrix != (not taps):
            return "it is no linear layer" if taps else "it is no convolution"
        if any(axis >= len(taps) for axis in self.first or ()):
            return f"its window has {len(taps)} axes"
        if self.first is not None and math.prod(taps[a] for a in self._second(whole)) == 1:
            return "its window has one tap along the axes of the second layer"
        if self.first and math.prod(taps[a] for a in self.first) == 1:
            return "its window has one tap along the axes of the first layer"
        if self.parts > 1 and (self.matrix or whole.kernel.weight.shape[1] % self.parts):
            return f"its {whole.kernel.weight.shape[1]} inputs do not make {self.parts} equal groups of a convolution"
        return None

    def full(self, whole: Whole) -> Ranks:
        rows = whole.kernel.outputs // whole.groups * self._taps(whole, self._second(whole))
        return (min(rows, whole.kernel.weight.shape[1] // self.parts * self._taps(whole, self._axes(whole))),)

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        pair = self._pair(whole, ranks[0])
        return [pair[0].weight, pair[1].weight]

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        first, second = self._pair(whole, factors[0].shape[0] // (whole.groups * self.parts))
        made = write_kernel(writer, writer.source, replace(first, weight=factors[0]), "0")
        return write_kernel(writer, made, replace(second, weight=factors[1]), "1", writer.bias)

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        fold = self._fold(problem)
        if fold.reduced is not None:
            return fold.reduced.factors(*fold.solved(ranks[0]))
        return self._laid_out(problem.whole, *fold.solved(ranks[0]))

    def errors(self, problem: Problem, wanted: Sequence[Ranks]) -> list[float]:
        fold = self._fold(problem)
        if fold.is_direct and problem.solver != "semi-nmf":
            return fold.tails([ranks[0] for ranks in wanted])
        made = (self._laid_out(problem.whole, *fold.solved(ranks[0])) for ranks in wanted)
        return [problem.error(self.dense(problem.whole, factors)) for factors in made]

    def _fold(self, problem: Problem) -> _Fold:
        """Made once for a problem: other forms build on this one."""
        found = problem.kept.get(self)
        if not isinstance(found, _Fold):
            found = problem.kept[self] = _Fold(self, problem)
        return found

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        a, b = self._matrices(whole, factors)
        return self.unfolded(whole, a @ b)

    # Layouts: G groups, k parts, p = out / G * taps of the second layer, q = in / G / k * taps of the first, r ranks

    def folded(self, whole: Whole, weight: Tensor) -> Tensor:
        """[out, in / groups, *k] as [G, k, p, q]."""
        wide = self._split(whole, weight).permute(self._order(whole))
        rows = wide.dim() - 1 - len(self._axes(whole))
        return wide.flatten(rows).flatten(2, rows - 1)

    def unfolded(self, whole: Whole, matrix: Tensor) -> Tensor:
        """The inverse of `folded`."""
        order, taps = self._order(whole), whole.kernel.size
        shape = self._split(whole, whole.kernel.weight).shape
        wide = matrix.reshape([shape[place] for place in order])
        inverse = [order.index(place) for place in range(len(order))]
        return wide.permute(inverse).reshape(whole.kernel.outputs, -1, *taps)

    def metric(self, whole: Whole, moments: Tensor) -> Tensor:
        """C [G, n, n] in the order of the folds: [G, k, taps', q, k, taps', q]."""
        axes, second, taps = self._axes(whole), self._second(whole), whole.kernel.size
        side = (self.parts, whole.kernel.weight.shape[1] // self.parts, *taps)
        order = [0, *(2 + axis for axis in second), 1, *(2 + axis for axis in axes)]
        wide = moments.reshape(-1, *side, *side)
        wide = wide.permute(0, *(1 + place for place in order), *(1 + len(side) + place for place in order))
        rows = (self.parts, self._taps(whole, second), side[1] * self._taps(whole, axes))
        return wide.reshape(-1, *rows, *rows)

    def _split(self, whole: Whole, weight: Tensor) -> Tensor:
        return weight.reshape(
            whole.groups, weight.shape[0] // whole.groups, self.parts, weight.shape[1] // self.parts, *weight.shape[2:]
        )

    def _order(self, whole: Whole) -> list[int]:
        return [0, 2, 1, *(4 + a for a in self._second(whole)), 3, *(4 + a for a in self._axes(whole))]

    def _laid_out(self, whole: Whole, a: Tensor, b: Tensor) -> list[Tensor]:
        """A [G, k, p, r] and B [G, k, r, q] as the weights of the two layers.

        Both are of one size, channel by channel, so that they learn at one rate."""
        sizes = (b.norm(dim=-1) / a.norm(dim=-2).clamp(min=1e-200)).sqrt()
        sizes = torch.where(sizes > 0, sizes, 1.0)
        a, b = a * sizes[..., None, :], b / sizes[..., None]
        first, second = self._pair(whole, b.shape[2])
        taps = [whole.kernel.size[axis] for axis in self._second(whole)]
        wide = a.reshape(whole.groups, self.parts, -1, *taps, b.shape[2])
        places = range(3, 3 + len(taps))
        wide = wide.permute(0, 2, 1, 3 + len(taps), *places)
        return [b.reshape(first.weight.shape), wide.reshape(second.weight.shape)]

    def _matrices(self, whole: Whole, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of `_laid_out`."""
        rank = factors[0].shape[0] // (whole.groups * self.parts)
        b = factors[0].reshape(whole.groups, self.parts, rank, -1)
        taps = [whole.kernel.size[axis] for axis in self._second(whole)]
        wide = factors[1].reshape(whole.groups, -1, self.parts, rank, *taps)
        wide = wide.permute(0, 2, 1, *range(4, 4 + len(taps)), 3)
        return wide.reshape(whole.groups, self.parts, -1, rank), b

    def _pair(self, whole: Whole, rank: int) -> tuple[Kernel, Kernel]:
        """The two layers, on the meta device."""
        k, axes = whole.kernel, self._axes(whole)
        inside = whole.groups * self.parts
        first = k.weight.new_empty(inside * rank, k.weight.shape[1] // self.parts, *(_only(k.size, axes)))
        second = k.weight.new_empty(k.outputs, self.parts * rank, *_only(k.size, self._second(whole)))
        return _sliding(k, first, axes, inside), _sliding(k, second, self._second(whole), whole.groups)

    def _axes(self, whole: Whole) -> tuple[int, ...]:
        return tuple(range(whole.kernel.axes)) if self.first is None else self.first

    def _second(self, whole: Whole) -> tuple[int, ...]:
        return tuple(axis for axis in range(whole.kernel.axes) if axis not in self._axes(whole))

    @staticmethod
    def _taps(whole: Whole, axes: Sequence[int]) -> int:
        return math.prod(whole.kernel.size[axis] for axis in axes)


def _only(sizes: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [size if axis in axes else 1 for axis, size in enumerate(sizes)]


def _sliding(kernel: Kernel, weight: Tensor, axes: Sequence[int], groups: int) -> Kernel:
    """A layer that slides along some axes of a kernel as that does."""
    padding = tuple(pair if axis in axes else (0, 0) for axis, pair in enumerate(kernel.padding))
    stride, dilation = (tuple(_only(numbers, axes)) for numbers in (kernel.stride, kernel.dilation))
    return Kernel(weight, None, stride, padding, dilation, groups)


class _Fold:
    """The matrices of one problem in one folding, and what follows from them for every rank."""

    def __init__(self, form: Folded, problem: Problem) -> None:
        self.form, self._problem = form, weakref.ref(problem)
        whole = problem.whole
        self.reduced = problem.reduced if form.matrix else None
        plain = form.matrix and problem.outer is None and problem.solver != "semi-nmf"
        weight = problem.stored if plain else problem.weight  # which takes another time its memory
        self.matrix = form.folded(whole, weight) if self.reduced is None else self.reduced.matrix[None, None]
        self.scaled = self._on_outputs(0, self.matrix)
        self.moments = None if problem.moments is None else form.metric(whole, problem.moments)
        self._bases: dict[bool, Tensor] = {}

    @property
    def problem(self) -> Problem:
        """By a weak reference, as the problem keeps its folds: both are gone together, at once."""
        problem = self._problem()
        assert problem is not None
        return problem

    @property
    def is_direct(self) -> bool:
        """Whether errors of the rows of a fold add up to the error of the layer: each output reads one row once."""
        return self.moments is None or self.moments.shape[1:3] == (1, 1)

    @property
    def inner(self) -> Tensor | None:
        """Moments of what the first layer reads, summed over the taps of the second one: [G, k, q, q]."""
        if self.moments is None or self.is_direct:
            return None if self.moments is None else self.moments[:, :, 0, :, 0, 0]
        return torch.einsum("ghdqhdr->ghqr", self.moments)

    def basis(self, *, aware: bool, count: int | None) -> Tensor:
        if aware not in self._bases or (count or self._bases[aware].shape[-1]) > self._bases[aware].shape[-1]:
            self._bases[aware] = basis(self.scaled, self.inner if aware else None, self.problem, count)
        return self._bases[aware]

    def tails(self, wanted: Sequence[int]) -> list[float]:
        """Errors by rank, where they are direct: what is left of the outputs' covariance outside of the basis."""
        u = self.basis(aware=self.problem.is_aware, count=max(wanted))
        parts = u.split(_COLUMNS, dim=-1)
        covered = (squares(product(part.transpose(-1, -2), self.scaled), self.inner) for part in parts)
        gains = torch.cat(list(covered), dim=-1).sum((0, 1))
        complete = len(gains) == min(self.matrix.shape[-2:])
        left = 0.0 if complete else max(self.problem.energy - float(gains.sum()), 0.0)
        beyond = gains.flip(0).cumsum(0).flip(0).tolist()
        return [left + (beyond[rank] if rank < len(beyond) else 0.0) for rank in wanted]

    def solved(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [G, k, p, r] and B [G, k, r, q]: the decoder and the encoder."""
        if self.problem.solver == "semi-nmf":
            return semi_nonnegative(self.matrix, rank, self.problem.seed)
        aware = self.problem.is_aware
        if not aware or self.is_direct:
            return self._projected(rank, aware=aware)
        # What the second layer adds up is more than the sum of its rows: it is fitted to both encoders.
        tried = [self._refitted(*self._projected(rank, aware=one)) for one in (True, False)]
        return min(tried, key=lambda pair: self._error(*pair))

    def _projected(self, rank: int, *, aware: bool) -> tuple[Tensor, Tensor]:
        u = self.basis(aware=aware, count=rank)[..., :rank]
        encoder = product(u.transpose(-1, -2), self.scaled)
        return self._on_outputs(1, u), encoder

    def _on_outputs(self, which: int, matrix: Tensor) -> Tensor:
        """The root of what outputs count, or its inverse, times [G, k, p, n]."""
        roots = self.problem.roots
        if roots is None or self.reduced is not None:
            return matrix
        by_output = matrix.reshape(*matrix.shape[:2], roots[which].shape[-1], -1)
        return self.problem.by_outputs(which, by_output).reshape(matrix.shape)

    def _refitted(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A moved to what is nearest on the data: least squares of the outputs on what B makes of all windows."""
        assert self.moments is not None
        groups, parts, taps, q = self.moments.shape[:4]
        rank, count = b.shape[2], parts * taps * q
        made = b[:, :, None] @ self.moments.reshape(groups, parts, taps, q, count)  # [G, k, taps', r, n]
        gram = torch.einsum("gnhdq,ghrq->gnhdr", made.reshape(groups, -1, parts, taps, q), b)
        cross = self._by_output(self.matrix, q) @ made.reshape(groups, -1, count).transpose(1, 2)
        size = parts * taps * rank
        fitted = nearest_decoder(self._by_output(a, rank), cross, gram.reshape(groups, size, size))
        return self._by_part(fitted, rank), b

    def _by_output(self, matrix: Tensor, last: int) -> Tensor:
        """[G, k, p, last] as [G, out / G, k * taps' * last]."""
        parts, taps = self._counts()
        split = matrix.reshape(len(matrix), parts, -1, taps, last)
        return split.movedim(1, 2).reshape(len(matrix), -1, parts * taps * last)

    def _by_part(self, matrix: Tensor, last: int) -> Tensor:
        """The inverse of `_by_output`."""
        parts, taps = self._counts()
        return matrix.reshape(len(matrix), -1, parts, taps, last).movedim(2, 1).reshape(len(matrix), parts, -1, last)

    def _counts(self) -> tuple[int, int]:
        assert self.moments is not None
        return self.moments.shape[1], self.moments.shape[2]

    def _error(self, a: Tensor, b: Tensor) -> float:
        return self.problem.error(self.form.unfolded(self.problem.whole, a @ b))
