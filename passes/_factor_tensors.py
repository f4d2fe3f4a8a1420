"""Factorisations of a convolution as a tensor: Tucker's with two small 1x1 layers, and the canonical polyadic one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.passes._factor_decompositions import polyadic, tucker
from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_forms import Form, Ranks
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Problem, Solver, nearest_decoder
from graphopt.passes._factor_writer import Writer, write_kernel
from graphopt.passes._kernel import Kernel
from graphopt.rewriter import Node

__all__ = ["Polyadic", "Tucker"]

_POINT, _WINDOW = Folded("1x1 first", first=()), Folded("1x1 last")


def _why_not(whole: Whole) -> str | None:
    if whole.embedding or not whole.kernel.axes:
        return "it is no convolution"
    if whole.groups > 1:
        return f"it is in {whole.groups} groups"
    return "its window has one tap" if math.prod(whole.kernel.size) == 1 else None


@dataclass(frozen=True)
class Tucker(Form):
    """Three layers: 1x1 to r channels, the window from r to s channels, 1x1 to the outputs.

    W [out, in, *k] = sum over a and b of U [out, a] K [a, b, *k] V [b, in], with s values of a and r of b. (Kim et al.,
    Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications, ICLR 2016.) In the
    measure of the data, K and U are the nearest ones to V that the data knows.
    """

    name: str = "tucker"
    solvers: ClassVar[Sequence[Solver]] = ("svd", "activation", "fisher")

    def why_not(self, whole: Whole) -> str | None:
        return _why_not(whole)

    def full(self, whole: Whole) -> Ranks:
        out, inputs = whole.kernel.outputs, whole.kernel.inputs
        taps = math.prod(whole.kernel.size)
        return min(inputs, out * taps), min(out, inputs * taps)

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        inner, outer = ranks
        new, ones = whole.kernel.weight.new_empty, [1] * whole.kernel.axes
        return [
            new(inner, whole.kernel.inputs, *ones),
            new(outer, inner, *whole.kernel.size),
            new(whole.kernel.outputs, outer, *ones),
        ]

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        whole, shapes = problem.whole, [factor.shape for factor in self.empty(problem.whole, ranks)]
        found = tucker(problem.weight, *ranks)
        plain = [factor.reshape(shape) for factor, shape in zip(found, shapes, strict=True)]
        if not problem.is_aware:
            return plain
        start = _POINT.factors(replace(problem, moments=None, outer=None), ranks[:1])[0]
        aware = _POINT.factors(problem, ranks[:1])[0]
        tried = [self._after(problem, one, ranks) for one in (plain[0], start, aware)]
        return min(tried, key=lambda factors: problem.error(self.dense(whole, factors)))

    def _after(self, problem: Problem, first: Tensor, ranks: Ranks) -> list[Tensor]:
        """The window and the last layer that are best behind a first one."""
        whole, moments = problem.whole, problem.moments
        assert moments is not None
        v = first.flatten(1)
        side = _POINT.metric(whole, moments)[0, 0, :, :, 0]  # [taps, in, taps, in]
        taps, rank = side.shape[0], len(v)
        half = torch.einsum("dqec,rc->dqer", side, v)
        gram = torch.einsum("dqer,sq->sdre", half, v).reshape(rank * taps, rank * taps)
        cross = torch.einsum("odq,dqer->ore", self._by_tap(whole, problem.weight), half).flatten(1)
        window = nearest_decoder(torch.zeros_like(cross), cross, gram).reshape(-1, rank, *whole.kernel.size)
        inner = replace(whole, kernel=replace(whole.kernel, weight=window.to("meta")))
        rest = Problem(inner, window, problem.solver, gram[None], problem.outer, problem.seed)
        return [first, *_WINDOW.factors(rest, ranks[1:])]

    @staticmethod
    def _by_tap(whole: Whole, weight: Tensor) -> Tensor:
        return weight.flatten(2).transpose(1, 2)

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        v, window, u = factors[0].flatten(1), factors[1].flatten(2), factors[2].flatten(1)
        return torch.einsum("oa,abt,bi->oit", u, window, v).reshape(whole.kernel.weight.shape)

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        made = write_kernel(writer, writer.source, _pointwise(factors[0]), "0")
        made = write_kernel(writer, made, replace(whole.kernel, weight=factors[1]), "1")
        return write_kernel(writer, made, _pointwise(factors[2]), "2", writer.bias)


@dataclass(frozen=True)
class Polyadic(Form):
    """1x1 to r channels, a depthwise layer along each axis, 1x1 to the outputs.

    W [out, in, *k] = sum over r of A [out, r] B [r, in] K_1 [r, k_1] K_2 [r, k_2]: the canonical polyadic
    decomposition, by alternating least squares. (Lebedev et al., Speeding-up Convolutional Neural Networks Using
    Fine-tuned CP-Decomposition, ICLR 2015.) In the measure of the data A is the nearest one to all others.
    """

    name: str = "cp"
    solvers: ClassVar[Sequence[Solver]] = ("svd", "activation", "fisher")

    def why_not(self, whole: Whole) -> str | None:
        return _why_not(whole)

    def full(self, whole: Whole) -> Ranks:
        shape = whole.kernel.weight.shape
        return (math.prod(shape) // max(shape),)

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        new, axes = whole.kernel.weight.new_empty, whole.kernel.axes
        along = [new(ranks[0], 1, *self._along(whole, axis)) for axis in range(axes)]
        return [
            new(ranks[0], whole.kernel.inputs, *[1] * axes),
            *along,
            new(whole.kernel.outputs, ranks[0], *[1] * axes),
        ]

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        whole = problem.whole
        a, b, *along = polyadic(problem.weight, ranks[0], problem.seed)
        matrices, shapes = [b.T, *(k.T for k in along), a], self.empty(whole, ranks)
        found = [matrix.reshape(shape.shape) for matrix, shape in zip(matrices, shapes, strict=True)]
        if problem.is_aware:
            rows = self._rows(found)
            assert problem.moments is not None
            read = rows @ problem.moments[0]
            cross = problem.weight.flatten(1) @ read.T
            found[-1] = nearest_decoder(a, cross, read @ rows.T).reshape(found[-1].shape)
        return found

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        return (factors[-1].flatten(1) @ self._rows(factors)).reshape(whole.kernel.weight.shape)

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        k, rank = whole.kernel, factors[0].shape[0]
        made = write_kernel(writer, writer.source, _pointwise(factors[0]), "0")
        for axis, weight in enumerate(factors[1:-1]):
            pads = tuple(pair if other == axis else (0, 0) for other, pair in enumerate(k.padding))
            stride, dilation = (
                tuple(number if other == axis else 1 for other, number in enumerate(numbers))
                for numbers in (k.stride, k.dilation)
            )
            made = write_kernel(writer, made, Kernel(weight, None, stride, pads, dilation, rank), str(axis + 1))
        return write_kernel(writer, made, _pointwise(factors[-1]), str(len(factors) - 1), writer.bias)

    @staticmethod
    def _along(whole: Whole, axis: int) -> list[int]:
        return [size if other == axis else 1 for other, size in enumerate(whole.kernel.size)]

    @staticmethod
    def _rows(factors: Sequence[Tensor]) -> Tensor:
        """What all layers but the last one multiply a window with: [r, in * taps]."""
        rows = factors[0].flatten(1)
        for weight in factors[1:-1]:
            rows = (rows[:, :, None] * weight.flatten(1)[:, None]).flatten(1)
        return rows


def _pointwise(weight: Tensor) -> Kernel:
    axes = weight.dim() - 2
    return Kernel(weight, None, (1,) * axes, ((0, 0),) * axes, (1,) * axes)
