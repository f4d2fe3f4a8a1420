"""Example inputs for tracing: sizes for the dynamic dims with which the graph runs, and names for them.

Nothing in an ONNX file says which sizes a dynamic dim may take: a network may need images of at least 32 pixels, or
multiples of 32, or sequences of at most 512. So several are tried, until the graph runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim

from graphopt.errors import UnsupportedError, UsageError
from graphopt.export import export
from graphopt.frontends.onnx.module import OnnxModule
from graphopt.frontends.onnx.reader import Graph, InputSpec

__all__ = ["Dims", "name_dims", "relax", "run_once"]

Dims = list[dict[int, str]]
"""Per input, the names of its dynamic axes."""

_BATCHES = (2, 1)
_SIZES = ((10, 3), (64, 32), (256, 32), (512, 64), (512, 0), (1024, 0), (16000, 0))
"""First size and step of the dims other than the first: distinct sizes first, later ones more likely to fit."""
_IMAGE_SIZES = ((256, 32), (512, 64), (512, 0), (64, 32), (32, 0))
"""The same for images: large enough that no intermediate size is one, which torch takes for a special case."""
_STEPS = (1, 2, 4, 8, 16, 32, 64)
_LARGEST_INPUT = 2**25


def name_dims(graph: Graph, sizes: Mapping[str, int]) -> Dims:
    """Name the dynamic dims: as in the file, made into Python names, or `INPUT_AXIS`; those in `sizes` stay fixed.

    Raises:
        UsageError: when `sizes` names no dynamic dim.
    """
    from graphopt.frontends.onnx.module import argument_names

    names = [
        {axis: _name(dim, argument, axis) for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)}
        for spec, argument in zip(graph.inputs, argument_names(graph), strict=True)
    ]
    known = {name for axes in names for name in axes.values()}
    unknown = [name for name in sizes if name not in known]
    if unknown:
        raise UsageError(
            f"there is no dynamic dim '{unknown[0]}' in the model",
            where=graph.source,
            todo=f"the dynamic dims are: {', '.join(sorted(known)) or 'none'}",
        )
    return names


def _name(dim: str | None, argument: str, axis: int) -> str:
    if dim is None:
        return f"{argument}_{axis}"
    name = re.sub(r"\W", "_", dim)
    return f"dim_{name}" if name[0].isdigit() else name


def run_once(module: OnnxModule, graph: Graph, names: Dims, sizes: Mapping[str, int]) -> list[Tensor]:
    """Run the module on zeros or ones of some legal size; returns these inputs.

    Raises:
        UnsupportedError: the one of the first sizes tried, when the graph runs with none.
    """
    free = {name: axis for axes in names for axis, name in axes.items() if name not in sizes}
    rows = zip(graph.inputs, names, strict=True)
    images = any(len(spec.dims) > 3 and axis > 1 for spec, axes in rows for axis in axes)
    failure: UnsupportedError | None = None
    for chosen in _choices(free, _IMAGE_SIZES if images else _SIZES):
        shapes = [_shape(s, axes, chosen | dict(sizes)) for s, axes in zip(graph.inputs, names, strict=True)]
        if max(map(math.prod, shapes), default=0) > _LARGEST_INPUT and failure is not None:
            continue
        inputs = [torch.ones(shape, dtype=s.dtype) for s, shape in zip(graph.inputs, shapes, strict=True)]
        try:
            with torch.no_grad():
                module(*inputs)
        except UnsupportedError as error:
            failure = failure or error
            continue
        return inputs
    assert failure is not None
    raise failure


def _choices(free: Mapping[str, int], ladder: Sequence[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Sizes for the free dims: the first axis is taken for a batch, the others get different sizes where they can."""
    batches = [name for name, axis in free.items() if axis == 0]
    others = [name for name, axis in free.items() if axis != 0]
    for batch in _BATCHES if batches else (0,):
        for first, step in ladder if others else ((0, 0),):
            yield dict.fromkeys(batches, batch) | {name: first + i * step for i, name in enumerate(others)}


def _shape(spec: InputSpec, names: Mapping[int, str], sizes: Mapping[str, int]) -> list[int]:
    return [dim if isinstance(dim, int) else sizes[names[axis]] for axis, dim in enumerate(spec.dims)]


def relax(
    module: OnnxModule, inputs: Sequence[Tensor], names: Dims, sizes: Mapping[str, int]
) -> tuple[list[dict[int, Any]], list[str]]:
    """What the graph makes of its dynamic dims: some turn out equal, multiples, bounded, or fixed.

    `torch.export` traces with automatic dims; the guards it collects are then solved for each symbol by trial: the
    smallest step (1, 2, 4, ...) and the smallest size from which on all guards hold.

    Returns:
        Per input what `capture` takes as `dynamic`, and the names of the dims that are fixed.
    """
    free = [{axis: Dim.AUTO for axis, name in axes.items() if name not in sizes} or None for axes in names]
    program = export(module, tuple(inputs), {}, free)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    traced = [node.meta["val"] for node in placeholders[len(placeholders) - len(inputs) :]]
    values = _example_values(traced, inputs)
    guards = {guard.expr for guard in traced[0].fake_mode.shape_env.guards} if values else set()
    roots: dict[sympy.Symbol, Any] = {}
    fixed: list[str] = []
    result: list[dict[int, Any]] = []
    for fake, axes in zip(traced, names, strict=True):
        result.append({})
        for axis, name in axes.items():
            symbol = _symbol(fake.shape[axis])
            if symbol in values and symbol not in roots:
                roots[symbol] = _solve(name, symbol, values, guards, program.range_constraints[symbol])
            if roots.get(symbol) is not None:
                result[-1][axis] = roots[symbol]
            elif name not in sizes:
                fixed.append(name)
    return result, sorted(set(fixed))


def _example_values(traced: Sequence[Tensor], inputs: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
    """The symbols that are sizes of inputs, with the size that each had."""
    return {
        symbol: int(real)
        for fake, example in zip(traced, inputs, strict=True)
        for size, real in zip(fake.shape, example.shape, strict=True)
        if (symbol := _symbol(size)) is not None
    }


def _symbol(size: Any) -> sympy.Symbol | None:
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression if isinstance(expression, sympy.Symbol) else None


def _solve(
    name: str, symbol: sympy.Symbol, values: Mapping[sympy.Symbol, int], guards: set[sympy.Expr], bounds: Any
) -> Any:
    """A torch dim of the sizes that meet the guards, other symbols at their example sizes; None if there is none."""
    own = [guard for guard in guards if symbol in guard.free_symbols]
    others = {other: size for other, size in values.items() if other != symbol}
    here = [guard.xreplace({o: sympy.Integer(v) for o, v in others.items()}) for guard in own]
    example, top = values[symbol], int(bounds.upper) if bool(bounds.upper < 2**40) else None

    def fits(size: int) -> bool:
        return all(guard.xreplace({symbol: sympy.Integer(size)}) == sympy.true for guard in here)

    for step in _STEPS:
        if example % step == 0 and all(fits(size) for size in _trials(example, step, top)):
            break
    else:
        return None
    low, high = 0, example // step  # `high` fits; where guards hold from some size on, halving finds it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * step) else (middle, high)
    upper = None if top is None else top // step
    if step == 1:
        return Dim(name, min=high, max=upper)
    return step * Dim(f"{name}_by_{step}", min=high, max=upper)


def _trials(example: int, step: int, top: int | None) -> list[int]:
    """Sizes to try above the example, odd and even multiples of the step, within the bound."""
    sizes = [example + i * step for i in (1, 2, 3, 4, 5, 7, 11, 16, 101, 1000)]
    return [size for size in sizes if top is None or size <= top]
