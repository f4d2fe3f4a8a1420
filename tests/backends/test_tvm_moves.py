"""Chains of operators that move elements: their indices are simplified together, and must stay the same indices."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

import graphopt as go
from tests.backends.moves import chain, shape
from tests.backends.test_tvm_operators import EachItsOwn


def around(x: torch.Tensor, pad: tuple[int, ...]) -> torch.Tensor:
    return F.pad(x, pad, mode="circular")


# What TVM's pass that makes buffers flat computes wrongly, or does not finish.
KNOWN = {
    "rolled_windows": ((1, 14, 14, 3), lambda x: x.roll((3, 3), (1, 2))),
    "rolled_rows_and_columns": ((4, 6, 1), lambda x: x.roll((1, 2), (0, 1))),
    "rolled_twice": ((1, 4, 6), lambda x: x.roll((1, 2), (1, 1)).unsqueeze(-1)),
    "flipped_unshuffle": ((3, 6, 4), lambda x: torch.stack([F.pixel_unshuffle(x, 2), F.pixel_unshuffle(x, 2).flip(0)])),
    "padded_around": (
        (3, 6, 4, 6),
        lambda x: around(around(around(x, (0, 1, 2, 0)), (0, 1, 1, 0)), (1, 1, 2, 2)),
    ),
}
CHAINS = 40


def wrong(cases: dict[str, tuple[tuple[int, ...], object]]) -> list[str]:
    """The names of chains that put an element elsewhere than torch does."""
    net = EachItsOwn({name: moved for name, (_, moved) in cases.items()})
    inputs = tuple(torch.arange(torch.Size(sizes).numel()).float().reshape(sizes) for sizes, _ in cases.values())
    found, expected = go.build(go.capture(net, inputs), threads=1)(*inputs), net(*inputs)
    return [name for name in cases if not torch.equal(found[name], expected[name])]


def test_what_once_went_wrong() -> None:
    assert wrong(KNOWN) == []


@pytest.mark.parametrize("seed", range(3))
def test_random_chains_put_every_element_where_torch_does(seed: int) -> None:
    rng = random.Random(seed)
    cases = {}
    for number in range(CHAINS):
        sizes = shape(rng)
        made = chain(rng, sizes, rng.randint(1, 4))
        cases[f"{number}, {sizes}: {made!r}"] = (sizes, made)
    assert wrong(cases) == []
