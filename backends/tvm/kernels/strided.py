"""Tensors that are parts of others: where each element lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

__all__ = ["Strided"]


@dataclass(frozen=True)
class Strided:
    """A tensor in the memory of a Relax value.

    Attributes:
        value: the expression whose memory it is.
        sizes: of the tensor, in torch's order of axes.
        strides: how far apart neighbours along each axis lie in `value`; zero for axes of one element.
        offset: where the first element lies.
    """

    value: Any
    sizes: tuple[Any, ...]
    strides: tuple[int, ...]
    offset: int

    def aligned(self, lanes: int) -> bool:
        """Whether all but the last axis move by whole chunks, and the last by single elements."""
        whole = all(step % lanes == 0 for step in (self.offset, *self.strides[:-1]))
        return whole and self.strides[-1] == 1

    def element(self, tensor: te.Tensor, at: Sequence[Any]) -> Any:
        """An element, in the tensor that holds the value."""
        number = tirx.const(self.offset, "int64") + sum(i * step for i, step in zip(at, self.strides, strict=True))
        indices = []
        for size in reversed(tensor.shape[1:]):
            indices.append(tirx.floormod(number, size))
            number = tirx.floordiv(number, size)
        return tensor(number, *reversed(indices))
