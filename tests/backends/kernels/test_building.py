"""What the kernel tests rely on: a kernel that reads or writes too far, or leaves something out, is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tvm import te, tirx

from graphopt.backends.tvm.kernels.emit import Code, index
from tests.backends.kernels.building import compiled, operand
from tests.backends.kernels.typed import compiled_typed
from tests.compare import relative_error

SIZE = 16


def copy(first: int = 0, end: int = SIZE, ahead: int = 0, zero: bool = False, dtype: str = "float32") -> Any:
    """y[i] = x[i + ahead] (or zero) for first <= i < end."""
    x = operand(SIZE, dtype=dtype)
    function = te.create_prim_func([x, te.compute((SIZE,), lambda i: x(i), name="y")], "int64")
    source, target = function.params
    code = Code()
    with code.loop("i", end - first) as i:
        place = i + first
        code.store(target, place, tirx.const(0, dtype) if zero else source[index(ahead) + place])
    attributes = {key: value for key, value in function.attrs.items() if key != "s_tir"}
    return tirx.PrimFunc(function.params, code.done()).with_attrs(attributes)


FLAWS = {
    "reads before": {"ahead": -1},
    "reads beyond": {"ahead": 1},
    "leaves out the first": {"first": 1},
    "leaves out the last": {"end": SIZE - 1},
}
WRITES = {
    "writes before": {"first": -1},
    "writes beyond": {"end": SIZE + 1},
    "reads and writes beyond": {"ahead": 1, "end": SIZE + 1},
    "zeroes before": {"first": -1, "zero": True},
    "zeroes beyond": {"end": SIZE + 1, "zero": True},
}
DTYPES = ["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"]


def built(library: Callable[..., Any], dtype: str = "float32") -> dict[str, Any]:
    cases = {"right": {}} | FLAWS | WRITES
    return library({name.replace(" ", "_"): copy(**how, dtype=dtype) for name, how in cases.items()})


def test_flaws_are_seen() -> None:
    kernels, x = built(compiled), torch.randn(SIZE)
    assert torch.equal(kernels["right"](x, shape=(SIZE,)), x)
    for name in FLAWS:
        assert relative_error(kernels[name.replace(" ", "_")](x, shape=(SIZE,)), x) > 1, name
    for name in WRITES:
        with pytest.raises(AssertionError, match="written outside"):
            kernels[name.replace(" ", "_")](x, shape=(SIZE,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_flaws_are_seen_whatever_the_dtype(dtype: str) -> None:
    kernels, kind = built(compiled_typed, dtype), getattr(torch, dtype)
    x = torch.zeros(SIZE, dtype=kind)

    def run(name: str) -> Tensor:
        return kernels[name.replace(" ", "_")]([x], (SIZE,), kind)

    assert torch.equal(run("right"), x)
    for name in FLAWS:
        assert not torch.equal(run(name), x), name
    for name in WRITES:
        if dtype == "bool" and "zero" in name:
            continue  # false is what is there
        with pytest.raises(AssertionError, match="written outside"):
            run(name)
