"""How much a function of a compiled model computes and moves, counted from its blocks before kernels replace them.

Arithmetic is that of sums of products: two operations for each element of the iteration space. All else (activations,
maxima, copies) counts by the bytes of its operands, each parameter once. Winograd's convolution counts its own
products, (m + 2)^2 for a square of m x m pixels where the direct form has 9 m^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import DataType, ir, s_tir, sym, tirx

from graphopt.backends.tvm.kernels.fused import ANCHOR

__all__ = ["Work", "work_of"]

_BITS_PER_BYTE = 8


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one call.

    Attributes:
        flops, bytes: numbers, or expressions in sizes that are known when the code runs.
        shapes: of each parameter, in which those sizes stand; an empty one for a number.
        parameters: the parameters themselves.
    """

    flops: Any
    bytes: Any
    shapes: tuple[tuple[Any, ...], ...]
    parameters: tuple[Any, ...]

    def at(self, arguments: Sequence[Any]) -> tuple[int, int] | None:
        """Operations and bytes of a call with these arguments; None when they do not tell all sizes."""
        values: list[tuple[Any, int]] = []
        for parameter, shape, argument in zip(self.parameters, self.shapes, arguments, strict=True):
            if isinstance(argument, int):
                values.append((parameter, argument))
            for dim, size in zip(shape, getattr(argument, "shape", ()), strict=False):
                if isinstance(dim, tirx.Var):
                    values.append((dim, int(size)))
        flops, moved = _value(self.flops, values), _value(self.bytes, values)
        return None if flops is None or moved is None else (flops, moved)


def _value(expression: Any, values: Sequence[tuple[Any, int]]) -> int | None:
    if isinstance(expression, int):
        return expression

    def number(variable: Any) -> Any:
        found = next((value for known, value in values if known.same_as(variable)), None)
        return variable if found is None else tirx.const(found, str(variable.ty.dtype))

    result = sym.Analyzer().simplify(tvm_ffi.structural_map(expression, (tirx.Var, number), order="post"))
    return int(result) if isinstance(result, tirx.IntImm) else None


def work_of(function: Any) -> Work:
    """Count a function that has not been scheduled yet."""
    blocks = _blocks(function.body)
    parameters = tuple(function.params)
    shapes = tuple(tuple(getattr(parameter.ty, "shape", ())) for parameter in parameters)
    flops = _sum([_flops(block) for block in blocks])
    moved = _sum([_bytes(p, shape, blocks) for p, shape in zip(parameters, shapes, strict=True) if shape])
    return Work(flops, moved, shapes, parameters)


def _blocks(body: Any) -> list[Any]:
    """The blocks of a function but the root."""
    found: list[Any] = []
    tvm_ffi.structural_walk(body, (s_tir.SBlockRealize, lambda realize: found.append(realize.block)))
    return [block for block in found if block.name_hint != "root"]


def _flops(block: Any) -> Any:
    if not isinstance(block.body, tirx.BufferStore) or block.init is None:
        return 0
    value = block.body.value
    if not (isinstance(value, tirx.Add) and _is_product(value.b)):
        return 0
    extents = [variable.dom.extent for variable in block.iter_vars]
    notes = block.annotations
    kind = str(notes.get(ANCHOR, ""))
    if kind == "winograd":
        square = int(notes["graphopt.square"])
        images, rows, columns, channels, _, _, depth, *_ = extents
        squares = -(-int(rows) // square) * -(-int(columns) // square)
        extents = [images, squares, channels, depth, (square + 2) ** 2]
    elif kind == "strassen":
        *rows, columns, depth, products = extents
        return 2 * _product([*rows, columns, depth, products]) // 8
    return 2 * _product(extents)


def _is_product(value: Any) -> bool:
    while isinstance(value, tirx.Cast):
        value = value.value
    return isinstance(value, tirx.Mul)


def _bytes(parameter: Any, shape: Sequence[Any], blocks: Sequence[Any]) -> Any:
    """Bytes of a parameter, or of what can be read of it at most: a look-up reads few rows of its table."""
    each = DataType(str(parameter.dtype))
    elements = _product(shape)
    touched = _touched(parameter, blocks)
    if isinstance(elements, int) and isinstance(touched, int):
        elements = min(elements, touched)
    return elements * max(1, each.bits * each.lanes // _BITS_PER_BYTE)


def _touched(parameter: Any, blocks: Sequence[Any]) -> Any:
    """Loads and stores of a parameter; None where they cannot be counted."""
    total: Any = 0
    for block in blocks:
        if not isinstance(block.body, tirx.BufferStore):
            return None
        times = 1 if block.body.buffer.same_as(parameter) else 0

        def load(node: Any) -> None:
            nonlocal times
            times += 1 if node.source.same_as(parameter) else 0

        tvm_ffi.structural_walk(block.body.value, (ir.TensorLoad, load))
        total = total + times * _product([variable.dom.extent for variable in block.iter_vars])
    return total


def _product(sizes: Sequence[Any]) -> Any:
    numbers = [int(size) for size in sizes if isinstance(size, int | tirx.IntImm)]
    others = [size for size in sizes if not isinstance(size, int | tirx.IntImm)]
    result: Any = math.prod(numbers)
    for size in others:
        result = size * result
    return result


def _sum(terms: Sequence[Any]) -> Any:
    total: Any = 0
    for term in terms:
        total = term if isinstance(total, int) and total == 0 else total + term
    return total
