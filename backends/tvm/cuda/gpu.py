"""What kernels need to know of the GPU that they are written for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphopt.backends.tvm.cuda.tiles import Tile
from graphopt.target import Target

__all__ = ["Gpu"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as a kernel sees it.

    Attributes:
        arch: such as `sm_90`.
        clusters: whether blocks form clusters that reach each other's shared memory.
        tiles: tiles to use for products of (rows, columns, bytes of depth), instead of those thought best.
    """

    arch: str
    clusters: bool
    tiles: Mapping[tuple[int, int, int], Tile] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target) -> Gpu:
        return cls(target.arch, int(target.arch.removeprefix("sm_").rstrip("af")) >= 90)
