"""Decompositions of tensors by tensorly, in float64 and in the sum of squares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["polyadic", "train", "tucker"]

_ITERATIONS = 50


def tucker(weight: Tensor, inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
    """V [inner, in], K [outer, inner, *k] and U [out, outer] of W [out, in, *k], U and V orthonormal: higher-order
    orthogonal iteration."""
    with _numbers() as decompositions:
        (core, (u, v)), _ = decompositions.partial_tucker(weight.numpy(), rank=(outer, inner), modes=(0, 1))
    return _tensor(v.T), _tensor(core), _tensor(u)


def polyadic(weight: Tensor, rank: int, seed: int) -> list[Tensor]:
    """For every axis of a tensor a matrix [size, rank], whose columns' outer products add up to it: alternating least
    squares from random matrices, so that other seeds find others."""
    with _numbers() as decompositions:
        found = decompositions.parafac(
            weight.numpy(), rank, n_iter_max=_ITERATIONS, init="random", random_state=seed, tol=1e-7
        )
    first, *others = found.factors
    return [_tensor(first * found.weights), *map(_tensor, others)]


def train(matrix: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """Cores [r, out_i, in_i, r'] of W [out_1, .., out_d, in_1, .., in_d]: the tensor train of pairs of axes, by
    one SVD after the other (Oseledets, Tensor-Train Decomposition, 2011)."""
    with _numbers() as decompositions:
        cores = decompositions.tensor_train_matrix(matrix.numpy(), rank=[1, *ranks, 1])
    return [_tensor(core) for core in cores]


@contextmanager
def _numbers() -> Iterator[Any]:
    """The decompositions, on numpy arrays whatever the user of tensorly has set."""
    import tensorly
    from tensorly import decomposition

    with tensorly.backend_context("numpy", local_threadsafe=True):
        yield decomposition


def _tensor(array: Any) -> Tensor:
    return torch.tensor(array, dtype=torch.float64)
