"""Example inputs for tracing: sizes for the dynamic dims with which the graph runs, and names for them.

Nothing in an ONNX file says which sizes a dynamic dim may take: a network may need images of at least 32 pixels, or
multiples of 32, or sequences of at most 512. So several are tried, until the graph runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import Dim

from graphopt.errors import UnsupportedError, UsageError
from graphopt.frontends.onnx.module import OnnxModule
from graphopt.frontends.onnx.reader import Graph, InputSpec

__all__ = ["Dims", "name_dims", "relax", "run_once"]

Dims = list[dict[int, str]]
"""Per input, the names of its dynamic axes."""

_BATCHES = (2, 1)
_SIZES = ((10, 3), (64, 32), (224, 32), (320, 64), (512, 0), (1024, 0), (16000, 0))
"""First size and step of the dims other than the first: distinct sizes first, later ones more likely to fit."""


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
    failure: UnsupportedError | None = None
    for chosen in _choices(free):
        inputs = [_example(s, axes, chosen | dict(sizes)) for s, axes in zip(graph.inputs, names, strict=True)]
        try:
            with torch.no_grad():
                module(*inputs)
        except UnsupportedError as error:
            failure = failure or error
            continue
        return inputs
    assert failure is not None
    raise failure


def _choices(free: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes for the free dims: the first axis is taken for a batch, the others get different sizes where they can."""
    batches = [name for name, axis in free.items() if axis == 0]
    others = [name for name, axis in free.items() if axis != 0]
    for batch in _BATCHES if batches else (0,):
        for first, step in _SIZES if others else ((0, 0),):
            yield dict.fromkeys(batches, batch) | {name: first + i * step for i, name in enumerate(others)}


def _example(spec: InputSpec, names: Mapping[int, str], sizes: Mapping[str, int]) -> Tensor:
    shape = [dim if isinstance(dim, int) else sizes[names[axis]] for axis, dim in enumerate(spec.dims)]
    return torch.ones(shape, dtype=spec.dtype)


def relax(module: OnnxModule, inputs: Sequence[Tensor], names: Dims, sizes: Mapping[str, int]) -> tuple[list[dict[int, object]], list[str]]:
    """What the graph makes of its dynamic dims: some turn out equal, multiples, bounded, or fixed.

    Returns:
        Per input what `capture` takes as `dynamic`, and the names of the dims that are fixed.
    """
    free = [{axis: Dim.AUTO for axis, name in axes.items() if name not in sizes} for axes in names]
    program = torch.export.export(module, tuple(inputs), dynamic_shapes=[axes or None for axes in free], strict=False)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders[-len(inputs) :]]
    roots: dict[object, object] = {}
    fixed: list[str] = []
    result: list[dict[int, object]] = []
    for value, axes in zip(values, names, strict=True):
        result.append({})
        for axis, name in axes.items():
            size = value.shape[axis]
            if name in sizes:
                continue
            if isinstance(size, int):
                fixed.append(name)
                continue
            expression = size.node.expr
            symbols = list(expression.free_symbols)
            factor = expression / symbols[0] if len(symbols) == 1 else None
            if factor is None or not factor.is_Integer:
                fixed.append(name)
                continue
            if symbols[0] not in roots:
                bounds = program.range_constraints[symbols[0]]
                high = int(bounds.upper) if bounds.upper.is_finite else None
                base = name if factor == 1 else f"{name}_over_{factor}"
                roots[symbols[0]] = Dim(base, min=max(int(bounds.lower), 1), max=high)
            root = roots[symbols[0]]
            result[-1][axis] = root if factor == 1 else int(factor) * root  # type: ignore[operator]
    return result, sorted(set(fixed))
