"""Every operator of the TVM backend's table against eager torch, in float32 and in the 16-bit floats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from tests.backends import edges
from tests.backends import operators as table
from tests.compare import relative_error

FAMILIES = {
    "unary": (table.UNARY, (table.X,)),
    "positive": (table.POSITIVE_UNARY, (table.POSITIVE,)),
    "binary": (table.BINARY, (table.X, table.Y)),
    "integer": (table.INTEGER, (table.INTEGERS, table.DIVISORS)),
    "reduce": (table.REDUCE, (table.X,)),
    "move": (table.MOVE, (table.X,)),
    "index": (table.INDEX, (table.X,)),
    "matmul": (table.MATMUL, (table.X, table.Y)),
    "conv": (table.CONV, (table.X, table.SIGNAL, table.VOLUME)),
    "pool": (table.POOL, (table.X, table.SIGNAL, table.VOLUME)),
    "norm": (table.NORM, (table.X,)),
}


class Family(nn.Module):
    """All functions of a family, their results under their names."""

    def __init__(self, functions: dict[str, table.Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *inputs: torch.Tensor) -> dict[str, object]:
        return {name: function(*inputs) for name, function in self.functions.items()}


class EachItsOwn(nn.Module):
    """All functions of a family, each on an input of its own."""

    def __init__(self, functions: dict[str, edges.Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *inputs: torch.Tensor) -> dict[str, object]:
        return {name: function(x) for (name, function), x in zip(self.functions.items(), inputs, strict=True)}


def _wrong(net: nn.Module, inputs: tuple[torch.Tensor, ...], limit: float) -> dict[str, object]:
    artifact = go.build(go.capture(net, inputs), threads=1)
    expected = net(*inputs)
    actual = artifact(*inputs)
    found = {}
    for name in expected:
        try:
            error = relative_error(actual[name], expected[name])
        except AssertionError as problem:
            found[name] = str(problem)
        else:
            if not error < limit:
                found[name] = error
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    functions, inputs = FAMILIES[family]
    assert _wrong(Family(functions), inputs, 5e-6) == {}


def test_edges_equal_eager() -> None:
    net = EachItsOwn({name: function for name, (function, _) in edges.CASES.items()})
    assert _wrong(net, tuple(x for _, x in edges.CASES.values()), 2e-6) == {}


def test_moving_bfloat16_changes_nothing() -> None:
    functions = {name: function for name, function in table.MOVE.items() if name not in ("like", "arange", "eye")}
    assert _wrong(Family(functions), (table.X.bfloat16(),), 1e-2) == {}


def test_numbers_are_rounded_before_they_meet_halves() -> None:
    functions: dict[str, table.Function] = {
        "gt": lambda x: x > 1.9,
        "eq": lambda x: x == 0.1,
        "to_bool": lambda x: x.bool(),
        "masked": lambda x: x.masked_fill(x <= 0.3, 2.0),
    }
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.tensor([1.9, 0.1, 0.3, 0.0, -1.0, float("nan")]).to(dtype)
        assert _wrong(Family(functions), (x,), 1e-6) == {}


def test_interpolation_tables_keep_float64() -> None:
    functions = {name: table.POOL[name] for name in ("bilinear_factor", "bilinear_antialias", "bicubic", "trilinear")}
    inputs = tuple(x.double() for x in (table.X, table.SIGNAL, table.VOLUME))
    assert _wrong(Family(functions), inputs, 1e-12) == {}
