"""Which tile a block of threads computes of a product."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TILES", "Tile", "best_tile"]

_CHUNK, _STEP = 16, 128
"""Bytes that are copied at once, and bytes of depth in a step; as in product.cuh."""

_SKEW = 8


@dataclass(frozen=True)
class Tile:
    """A block's share of a product, and how its warps divide it.

    Attributes:
        rows, columns: of the result.
        warp_rows, warp_columns: of the result, for a warp.
        stages: steps of the depth that shared memory holds.
        parts: blocks of a cluster, each of which sums over a part of the depth.
    """

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int
    parts: int = 1

    @property
    def threads(self) -> int:
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * 32

    @property
    def shared_bytes(self) -> int:
        """Shared memory: the stages, and later in their place the result in float32."""
        return max(self.stages * (self.rows + self.columns) * _STEP, 4 * self.rows * (self.columns + _SKEW))


TILES = (
    Tile(128, 128, 64, 32, 4),
    Tile(128, 64, 32, 32, 4),
    Tile(64, 128, 32, 32, 4),
    Tile(64, 64, 32, 32, 4),
    Tile(64, 64, 32, 16, 4),
    Tile(32, 64, 16, 32, 4),
    Tile(64, 32, 32, 16, 4),
    Tile(32, 32, 16, 16, 4),
    Tile(16, 64, 16, 16, 4),
    Tile(64, 16, 16, 16, 4),
)
"""The largest first."""

_MULTIPROCESSORS = 132
_STEP_TIME = 0.00022
_LATENCY = 0.45
"""Microseconds: of a step per fragment product, and of the first step of a block together with its end."""


def best_tile(rows: int, columns: int, batch: int, depth_bytes: int, clusters: bool) -> Tile:
    """The tile of least estimated time.

    Args:
        rows, columns: of one product; `batch` of them.
        depth_bytes: the depth in bytes.
        clusters: whether blocks can add up their sums (compute capability 9.0 and later).
    """
    steps = -(-depth_bytes // _STEP)
    choices = []
    for tile in TILES:
        for parts in (1, 2, 4, 8) if clusters else (1,):
            if parts > 1 and (steps < 2 * parts or tile.rows % (parts * 4)):
                continue
            blocks = math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns) * batch * parts
            choices.append(
                (_microseconds(tile, blocks, -(-steps // parts), parts), -tile.rows * tile.columns, parts, tile)
            )
    _, _, parts, tile = min(choices, key=lambda choice: choice[:3])
    return Tile(tile.rows, tile.columns, tile.warp_rows, tile.warp_columns, tile.stages, parts)


def _microseconds(tile: Tile, blocks: int, steps: int, parts: int) -> float:
    resident = max(1, min(200_000 // tile.shared_bytes, 1536 // tile.threads))
    waves = blocks / _MULTIPROCESSORS
    work = tile.rows * tile.columns / 128
    step = 0.06 + _STEP_TIME * work
    turns = math.ceil(waves / resident)
    busy = max(1.0, min(resident, waves))
    return turns * (_LATENCY + 0.35 * (parts > 1) + steps * (step + (busy - 1) * _STEP_TIME * work))
