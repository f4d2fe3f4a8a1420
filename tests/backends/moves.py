"""Random chains of operators that only move elements."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["Chain", "chain", "shape"]

Move = Callable[[torch.Tensor], torch.Tensor]
LARGEST = 4000


class Chain:
    """Moves one after another, and what they are."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.names: list[str] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for move in self.moves:
            x = move(x)
        return x

    def __repr__(self) -> str:
        return ", ".join(self.names)


def shape(rng: random.Random) -> tuple[int, ...]:
    """Small sizes, ones among them: two axes next to an axis of one are where flat indices are simplified."""
    return tuple(rng.choice((1, 2, 3, 4, 6)) for _ in range(rng.randint(2, 4)))


def chain(rng: random.Random, sizes: tuple[int, ...], length: int) -> Chain:
    """`length` moves that fit one after another, starting with a tensor of these sizes."""
    made = Chain()
    x = torch.empty(sizes)
    while len(made.moves) < length:
        name, move = _draw(rng, tuple(x.shape))
        try:
            moved = move(x)
        except (RuntimeError, ValueError, NotImplementedError):
            continue  # a circular pad of the wrong rank, say
        if 0 < moved.numel() <= LARGEST:
            made.moves.append(move)
            made.names.append(name)
            x = moved
    return made


def _draw(rng: random.Random, sizes: tuple[int, ...]) -> tuple[str, Move]:
    rank = len(sizes)
    axes = rng.sample(range(rank), rng.randint(1, min(rank, 3)))
    axis, size = axes[0], sizes[axes[0]]
    order = rng.sample(range(rank), rank)
    shifts = [rng.randint(-4, 4) for _ in axes]
    start, step = rng.randrange(size), rng.randint(1, 2)
    target = _other_shape(rng, math.prod(sizes))
    times = [rng.choice((1, 1, 2)) for _ in sizes]
    pad = [rng.randint(0, 2) for _ in range(2 * min(2, rank - 1))]
    mode = rng.choice(("circular", "reflect", "replicate", "constant"))
    window = rng.randint(1, size)
    mix = rng.sample(range(size), size)
    return rng.choice(
        [
            (f"roll({shifts}, {axes})", lambda x: x.roll(shifts, axes)),
            (f"flip({axes})", lambda x: x.flip(axes)),
            (f"permute({order})", lambda x: x.permute(order)),
            (f"reshape({target})", lambda x: x.reshape(target)),
            (f"narrow({axis}, {start})", lambda x: x.narrow(axis, start, size - start)),
            (f"every({axis}, {step})", lambda x: x[(slice(None),) * axis + (slice(None, None, step),)]),
            (f"repeat({times})", lambda x: x.repeat(times)),
            (f"repeat_interleave(2, {axis})", lambda x: x.repeat_interleave(2, axis)),
            (f"pad({pad}, {mode})", lambda x: F.pad(x, pad, mode=mode)),
            (f"unfold({axis}, {window})", lambda x: x.unfold(axis, window, step)),
            (f"index({axis}, {mix})", lambda x: x.index_select(axis, torch.tensor(mix))),
            (f"halves({axis})", lambda x: torch.cat([x.narrow(axis, start, size - start), x], axis)),
            (f"stack({axis})", lambda x: torch.stack([x, x.flip(axis)], axis)),
            ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2)),
            ("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2)),
        ]
    )


def _other_shape(rng: random.Random, count: int) -> list[int]:
    """Another way to write a number of elements."""
    sizes = []
    while count > 1 and len(sizes) < 3:
        sizes.append(rng.choice([d for d in range(1, count + 1) if count % d == 0]))
        count //= sizes[-1]
    return [*sizes, count]
