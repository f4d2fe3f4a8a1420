"""Weights with many more rows than columns, by square ones: nothing as large as the weight is made in float64.

Errors of W [p, q] that are measured by its outputs together do not change when these are rotated. So W = Q T with
orthonormal columns Q [p, q] has the factors of T [q, q], A_T B, with Q A_T in the place of A_T; outputs that count
differently are scaled first. T comes from the eigenvectors V of W^T W = V S V^T, as S^1/2 V^T, and Q A_T is
W V S^-1/2 A_T, made a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Reduced", "is_long"]

_LARGE = 2**22
"""Elements from which a weight is reduced."""
_ROWS = 2**20
"""Elements in float64 at a time."""
_NOTHING = 1e-15
"""Of the largest eigenvalue of W^T W: of smaller ones rounding alone is left."""


def is_long(weight: Tensor) -> bool:
    """Whether a weight [p, q] is large and has more than twice as many rows as columns."""
    return weight.dim() == 2 and weight.numel() >= _LARGE and len(weight) > 2 * weight.shape[1]


class Reduced:
    """T [q, q] in the place of W [p, q], and the way back.

    Attributes:
        matrix: T in float64.

    Args:
        weight: W in any dtype.
        counts: what errors of each row count, [p]; None where all count the same.
    """

    def __init__(self, weight: Tensor, counts: Tensor | None) -> None:
        self.weight = weight
        gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for place, rows in self._blocks():
            gram += rows.T @ (rows if counts is None else rows * counts[place, None])
        values, vectors = torch.linalg.eigh(gram)
        roots = values.clamp(min=0).sqrt()
        kept = values > _NOTHING * values[-1]
        self.matrix = vectors.T * torch.where(kept, roots, 0.0)[:, None]
        self._back = vectors * torch.where(kept, 1 / roots, 0.0)

    def factors(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """B [r, q] and Q A_T [p, r], for factors A_T [..., q, r] and B [..., r, q] of T.

        They are in the dtype of the weight, but at least float32, and of one size, channel by channel."""
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        sizes = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-200)).sqrt()  # Q changes no norm
        sizes = torch.where(sizes > 0, sizes, 1.0)
        back = self._back @ (a * sizes)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        made = torch.empty(len(self.weight), a.shape[1], dtype=dtype)
        for place, rows in self._blocks():
            made[place] = (rows @ back).to(dtype)
        return [(b / sizes[:, None]).to(dtype), made]

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, _ROWS // self.weight.shape[1])
        for start in range(0, len(self.weight), step):
            place = slice(start, start + step)
            yield place, self.weight[place].double().cpu()
