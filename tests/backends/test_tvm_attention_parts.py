"""Attention reads queries, keys and values where one product left them side by side; nothing is cut out before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backends.tvm import TvmArtifact
from tests.compare import relative_error

LIMIT = 2e-6
HEADS, WIDTH, LENGTH = 3, 32, 21
SIZE = HEADS * WIDTH


class Net(nn.Module):
    """One product for queries, keys and values, which `cut` takes apart as [batch, heads, length, width] each."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]], outputs: int = 3 * SIZE, **options: bool) -> None:
        super().__init__()
        self.together, self.last = nn.Linear(SIZE, outputs), nn.Linear(SIZE, SIZE)
        self.cut, self.options = cut, options

    def forward(self, x: Tensor) -> Tensor:
        made = F.scaled_dot_product_attention(*self.cut(self.together(x)), **self.options)
        return self.last(made.transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def one_after_the_other(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(part) for part in x.split(SIZE, -1))


def chosen_by_number(x: Tensor) -> tuple[Tensor, ...]:
    rows = x.unflatten(-1, (3, SIZE)).permute(2, 0, 1, 3)
    return tuple(_heads(rows[i]) for i in range(3))


def sliced(x: Tensor) -> tuple[Tensor, ...]:
    return _heads(x[..., SIZE : 2 * SIZE]), _heads(x[..., :SIZE]), _heads(x[..., -SIZE:])


def head_by_head(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in x.unflatten(-1, (HEADS, 3 * WIDTH)).chunk(3, -1))


def few_keys(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(part) for part in x.split([SIZE, WIDTH, WIDTH], -1))


def keys_are_values(x: Tensor) -> tuple[Tensor, ...]:
    query, key = (_heads(part) for part in x.chunk(2, -1))
    return query, key, key


def number_by_number(x: Tensor) -> tuple[Tensor, ...]:
    """Neighbours of a query's row lie three apart: no vector of them can be loaded."""
    return tuple(part.transpose(1, 2) for part in x.unflatten(-1, (HEADS, WIDTH, 3)).unbind(-1))


def shifted(x: Tensor) -> tuple[Tensor, ...]:
    """What is cut out is computed with, and has to be there by itself."""
    return tuple(part * 0.5 for part in one_after_the_other(x))


def _built(net: nn.Module, x: Tensor, **options: object) -> TvmArtifact:
    artifact = go.build(go.capture(net.eval(), (x,), **options), threads=2)  # type: ignore[arg-type]  # by name
    assert isinstance(artifact, TvmArtifact)
    return artifact


def _copies(artifact: TvmArtifact) -> list[str]:
    return [name for name in artifact.coverage.rules.get("elementwise", ()) if "reshape" not in name or "split" in name]


@pytest.mark.parametrize(
    ("cut", "outputs", "options"),
    [
        (one_after_the_other, 3 * SIZE, {}),
        (one_after_the_other, 3 * SIZE, {"is_causal": True}),
        (chosen_by_number, 3 * SIZE, {}),
        (sliced, 3 * SIZE, {}),
        (head_by_head, 3 * SIZE, {}),
        (few_keys, SIZE + 2 * WIDTH, {"enable_gqa": True}),
        (keys_are_values, 2 * SIZE, {}),
    ],
)
def test_parts_are_read_where_they_lie(
    cut: Callable[[Tensor], tuple[Tensor, ...]], outputs: int, options: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    for batch in (1, 2):
        net, x = Net(cut, outputs, **options), torch.randn(batch, LENGTH, SIZE)
        artifact = _built(net, x)
        assert relative_error(artifact(x), net(x)) < LIMIT
        assert _copies(artifact) == []
        assert artifact.built is not None
        (work,) = (work for name, work in artifact.built.work.items() if "attention" in name)
        shapes = [int(torch.Size([int(size) for size in shape]).numel()) for shape in work.shapes]
        assert work.bytes == 4 * sum(shapes) == 4 * batch * LENGTH * (outputs + SIZE)


@pytest.mark.parametrize("cut", [number_by_number, shifted])
def test_what_cannot_be_read_there_is_copied(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    torch.manual_seed(0)
    net, x = Net(cut), torch.randn(2, LENGTH, SIZE)
    artifact = _built(net, x)
    assert relative_error(artifact(x), net(x)) < LIMIT
    assert _copies(artifact)


def test_a_part_that_others_read_too() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # one output more
            query, key, value = self.cut(self.together(x))
            return F.scaled_dot_product_attention(query, key, value), value.exp()

    torch.manual_seed(0)
    net, x = Both(one_after_the_other), torch.randn(1, LENGTH, SIZE)
    assert relative_error(_built(net, x)(x), net(x)) < LIMIT


def test_free_sizes() -> None:
    torch.manual_seed(0)
    net, x = Net(one_after_the_other), torch.randn(2, LENGTH, SIZE)
    artifact = _built(net, x, dynamic={"x": {0: "batch", 1: "length"}})
    for shape in ((1, 5), (3, 40)):
        x = torch.randn(*shape, SIZE)
        assert relative_error(artifact(x), net(x)) < LIMIT
