"""What a factorisation has to be near to, and in which measure.

For a layer W, its approximation V and D = W - V the error is

    sum over groups g of tr(F_g D_g C_g D_g^T)

with C the moments of what the layer reads (see `_covariance`), so that without F it is the sum of squares by which the
layer's outputs change on the calibration data; without data C is the identity, and it is the square of the Frobenius
norm. F are moments of the gradients at the layer's outputs: Fisher information (see `_rank_fisher`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_reduced import Reduced, is_long

__all__ = ["AWARE", "SOLVERS", "Problem", "Solver", "basis", "nearest_decoder", "product", "squares"]

Solver = Literal["svd", "activation", "fisher", "semi-nmf", "random"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
AWARE = ("activation", "fisher")
"""Those that look for factors in the measure of the data; the others look at the weight alone."""

_RANDOMISED = 1024
"""Rows of a Gram matrix from which a few leading vectors are found by random projection."""
_RIDGE = 1e-10
"""Of the mean square of a number that is read: along what the data does not show, the weight alone decides."""
_DAMPING = 1e-3
"""Of the mean of what outputs count: none of them counts nothing."""
_SWEEPS = 60
_AT_A_TIME = 2**20
"""Elements in float64 of what is no larger than it has to be."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer to factorise.

    Attributes:
        stored: the weight, laid out as `whole.kernel.weight`.
        moments: C [groups, n, n], or [entries] of an embedding; None for the identity.
        outer: F [groups, m, m], m outputs a group, what errors of the outputs count, or its diagonal [groups, m]; None
            for the identity.
        seed: of random factors and random projections.
        kept: what forms have found out and need again.
    """

    whole: Whole
    stored: Tensor
    solver: Solver = "svd"
    moments: Tensor | None = None
    outer: Tensor | None = None
    seed: int = 0
    kept: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def weight(self) -> Tensor:
        """In float64."""
        return self.stored.double()

    @cached_property
    def reduced(self) -> Reduced | None:
        """A square matrix in the place of a linear layer with very many outputs."""
        apart = self.outer is None or self.outer.dim() == 2
        if self.whole.embedding or not apart or self.solver not in ("svd", *AWARE) or not is_long(self.stored):
            return None
        return Reduced(self.stored, None if self.roots is None else self.roots[0][0].square())

    @property
    def is_aware(self) -> bool:
        """Whether factors are looked for in the measure of the data."""
        return self.solver in AWARE and self.moments is not None

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor] | None:
        """The square root of F, made regular by a ridge, and its inverse: [groups, m, m] both, or [groups, m]."""
        if self.outer is None:
            return None
        if self.outer.dim() == 2:
            unit = self.outer.mean(-1, keepdim=True).clamp(min=1e-200)
            each = (self.outer + _DAMPING * unit).sqrt()
            return each, 1 / each
        values, vectors = torch.linalg.eigh(self.outer)
        unit = values.mean(-1, keepdim=True).clamp(min=1e-200)
        roots = (values.clamp(min=0) + _DAMPING * unit).sqrt()[..., None, :]
        back = vectors.transpose(-1, -2)
        return (vectors * roots) @ back, (vectors / roots) @ back

    def by_outputs(self, which: int, rows: Tensor) -> Tensor:
        """The root of F, or its inverse, times rows [groups, ..., m, n], one of an output each."""
        if self.roots is None:
            return rows
        root = self.roots[which].reshape(len(rows), *[1] * (rows.dim() - 3), *self.roots[which].shape[1:])
        return rows * root[..., None] if self.roots[which].dim() == 2 else root @ rows

    def error(self, dense: Tensor) -> float:
        """Of a weight in the place of the layer's."""
        return self._size(self.weight - dense)

    @cached_property
    def energy(self) -> float:
        """The error of zeros, which errors are relative to."""
        if self.reduced is None:
            return self._size(self.weight if self.whole.embedding or self.outer is not None else self.stored)
        return _weighed(self.reduced.matrix[None], self.moments)

    def _size(self, difference: Tensor) -> float:
        whole = self.whole
        rows = difference.T[None] if whole.embedding else difference.reshape(whole.groups, -1, whole.columns)
        return _weighed(self.by_outputs(0, rows), self.moments)


def _weighed(rows: Tensor, moments: Tensor | None) -> float:
    """tr(rows C rows^T), C being a diagonal where it has one number for a column."""
    if moments is None:
        return float(squares(rows, None).sum())
    return float((rows * moments * rows).sum() if moments.dim() == 1 else squares(rows, moments).sum())


def squares(rows: Tensor, metric: Tensor | None) -> Tensor:
    """r C r^T for each of the rows r of [..., p, q], with C [..., q, q]: [..., p]. A few rows at a time."""
    found = []
    for place in _pieces(rows, -2):
        part = rows[..., place, :].double()
        found.append(((part if metric is None else part @ metric) * part).sum(-1))
    return torch.cat(found, dim=-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float64 without a copy in float64 of the one that is of another dtype, if one is."""
    if b.dtype is torch.float64:
        return (
            a @ b if a.dtype is torch.float64 else product(b.transpose(-1, -2), a.transpose(-1, -2)).transpose(-1, -2)
        )
    a = a.double()
    made = a.new_empty(*a.shape[:-1], b.shape[-1])
    for place in _pieces(b, -1):
        made[..., place] = a @ b[..., place].double()
    return made


def _pieces(tensor: Tensor, axis: int) -> Iterator[slice]:
    """Places along an axis, a few at a time."""
    count = tensor.shape[axis]
    step = max(1, _AT_A_TIME * count // max(1, tensor.numel()))
    yield from (slice(start, start + step) for start in range(0, count, step))


def basis(matrix: Tensor, metric: Tensor | None, problem: Problem, count: int | None = None) -> Tensor:
    """Orthonormal columns U [..., p, r] in float64, best first, onto which the rows of matrix [..., p, q] are
    projected: r is min(p, q), or `count`. The dtype of the matrix may be any.

    They are the leading eigenvectors of `matrix metric matrix^T`, the covariance of the outputs: U U^T matrix is then
    the nearest of its rank, without an inverse of the metric, which may be singular. (Eckart and Young, 1936; for the
    output side Li et al., Swift-SVD, and Yu and Wu, Compressing Transformers: Features Are Low-Rank, but Weights Are
    Not!, AAAI 2023.)
    """
    p, q = matrix.shape[-2:]
    size = min(p, q)
    if problem.solver == "random":
        generator = torch.Generator().manual_seed(problem.seed)
        drawn = torch.randn(*matrix.shape[:-1], size, generator=generator, dtype=torch.float64)
        return _orthonormal(product(matrix, product(matrix.transpose(-1, -2), drawn)) if p > q else drawn)
    # Never added to a copy, which may be as large as all else.
    ridge = _RIDGE * _unit(metric) if metric is not None else torch.zeros(())
    few = count is not None and size >= _RANDOMISED and 4 * count <= size
    if p <= q or (metric is not None and few):
        gram = product(matrix if metric is None else _read(matrix, metric, ridge), matrix.transpose(-1, -2))
        return _leading(gram, size, count if few else None, problem.seed)
    if metric is not None:
        values, vectors = torch.linalg.eigh(metric)
        matrix = product(matrix, vectors) * (values[..., None, :].clamp(min=0) + ridge).sqrt()
    right = _leading(product(matrix.transpose(-1, -2), matrix), size, count if few else None, problem.seed)
    return _orthonormal(product(matrix, right))


def _read(matrix: Tensor, metric: Tensor, ridge: Tensor) -> Tensor:
    """matrix (metric + ridge I)"""
    read = product(matrix, metric)
    for place in _pieces(matrix, -2):
        read[..., place, :] += ridge * matrix[..., place, :]
    return read


def _orthonormal(columns: Tensor) -> Tensor:
    """The Q of a QR decomposition."""
    q: Tensor = torch.linalg.qr(columns).Q
    return q


def _leading(gram: Tensor, size: int, count: int | None, seed: int) -> Tensor:
    """Eigenvectors of a symmetric matrix by falling eigenvalue; `count` of them are found by random projection.

    (Halko, Martinsson and Tropp, Finding Structure with Randomness, 2011, algorithm 5.3.)
    """
    if count is None:
        whole: Tensor = torch.linalg.eigh(gram).eigenvectors
        return whole.flip(-1)[..., :size]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*gram.shape[:-1], count + 16, generator=generator, dtype=gram.dtype)
    for _ in range(4):
        drawn = _orthonormal(gram @ drawn)
    inner: Tensor = torch.linalg.eigh(drawn.transpose(-1, -2) @ gram @ drawn).eigenvectors
    return (drawn @ inner.flip(-1))[..., :count]


def semi_nonnegative(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """matrix [..., p, q] as F [..., p, r] times G [..., r, q] without a negative number in G.

    (Ding, Li and Jordan, Convex and Semi-Nonnegative Matrix Factorizations, 2010, equations 10 and 11, F by a ridge.)
    """
    generator = torch.Generator().manual_seed(seed)
    g = torch.rand(*matrix.shape[:-2], rank, matrix.shape[-1], generator=generator, dtype=matrix.dtype) + 0.1
    f = matrix
    for sweep in range(_SWEEPS + 1):
        f = nearest_decoder(torch.zeros_like(matrix @ g.transpose(-1, -2)), matrix @ g.transpose(-1, -2), _gram(g))
        if sweep == _SWEEPS:
            break
        ours, inner = f.transpose(-1, -2) @ matrix, f.transpose(-1, -2) @ f
        above = ours.clamp(min=0) + (-inner).clamp(min=0) @ g
        below = (-ours).clamp(min=0) + inner.clamp(min=0) @ g
        g = g * (above / below.clamp(min=1e-30)).sqrt()
    return f, g


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.transpose(-1, -2)


def nearest_decoder(start: Tensor, cross: Tensor, gram: Tensor) -> Tensor:
    """A [..., m, r] that minimises |y - A z|^2 over data with cross = sum y z^T and gram = sum z z^T.

    It is moved from `start` by a ridge so small that only what the data does not show stays there. Its error is never
    above that of `start`.
    """
    change: Tensor = torch.linalg.solve(_held(gram), (cross - start @ gram).transpose(-1, -2))
    return start + change.transpose(-1, -2)


def _held(moments: Tensor) -> Tensor:
    """Moments that a ridge has made regular, one as well that is all zeros."""
    return moments + _RIDGE * _unit(moments) * torch.eye(moments.shape[-1], dtype=moments.dtype)


def _unit(moments: Tensor) -> Tensor:
    """The mean square of a number, [..., 1, 1]."""
    return moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-200)[..., None, None]
