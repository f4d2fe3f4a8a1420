"""The table of ATen operators that the TVM backend converts, and how a converter is called.

A converter is a function `(call, **arguments) -> value`, where the arguments are those of the operator's schema under
the schema's own names, defaults filled in. It names every one of them, so that none is ignored by accident:
an argument it cannot honour is refused with `Refused`. Tensors arrive as Relax expressions, sizes as integers or TIR
expressions. What it returns is cast to the dtype, and checked against the shape, that torch inferred for the node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from tvm import ir, relax, te, tirx

__all__ = ["CONVERTERS", "Call", "Converter", "Refused", "converts", "dtype_name", "wide"]

Converter = Callable[..., Any]

CONVERTERS: dict[torch._ops.OpOverload, Converter] = {}

_NARROW_FLOATS = ("float16", "bfloat16")


class Refused(Exception):
    """This backend cannot convert a node; the message is the reason."""


def converts(*overloads: torch._ops.OpOverload) -> Callable[[Converter], Converter]:
    """Register a function as the converter of the given overloads."""

    def register(function: Converter) -> Converter:
        for overload in overloads:
            if overload in CONVERTERS:
                raise ValueError(f"two converters for {overload}")
            CONVERTERS[overload] = function
        return function

    return register


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32; TVM uses the same names."""
    return str(dtype).removeprefix("torch.")


def wide(dtype: str) -> str:
    """The dtype to compute in: float32 for the 16-bit floats, as torch does on a CPU."""
    return "float32" if dtype in _NARROW_FLOATS else dtype


class Call:
    """One node under conversion: its torch metadata, and the means to emit Relax code for it."""

    def __init__(self, builder: relax.BlockBuilder, node: fx.Node, size: Callable[[Any], Any]) -> None:
        self.builder = builder
        self.node = node
        self._size = size

    @property
    def meta(self) -> Any:
        """The fake tensor (or tuple of them) that torch inferred for the node."""
        return self.node.meta["val"]

    @property
    def dtype(self) -> str:
        """Dtype of the (first) result."""
        return dtype_name(self._first_meta().dtype)

    @property
    def shape(self) -> list[Any]:
        """Sizes of the (first) result, integers or TIR expressions."""
        return self.sizes(self._first_meta())

    def sizes(self, meta: torch.Tensor) -> list[Any]:
        """The sizes of a fake tensor as integers or TIR expressions."""
        return [self._size(size) for size in meta.shape]

    def meta_of(self, position: int) -> Any:
        """Metadata of the node's argument at `position`: a fake tensor, or the plain value itself."""
        value = self.node.args[position]
        return value.meta["val"] if isinstance(value, fx.Node) else value

    def emit(self, expression: Any) -> Any:
        return self.builder.emit(expression)

    def cast(self, value: Any, dtype: str) -> Any:
        """`value` in `dtype`; nothing is emitted when it already is."""
        return value if dtype_of(value) == dtype else self.emit(relax.op.astype(value, dtype))

    def operand(self, value: Any, dtype: str) -> Any:
        """A tensor cast to `dtype`, or a Python number as a constant of that dtype."""
        if isinstance(value, bool | int | float):
            return relax.const(value, dtype)
        if not isinstance(value, ir.Expr) or not isinstance(value.ty, relax.TensorType):
            raise Refused(f"an operand is not a tensor or a plain number: {value}")
        return self.cast(value, dtype)

    def compute(self, function: Callable[..., te.Tensor], *inputs: Any, name: str = "compute") -> Any:
        """Emit a tensor-expression function of the inputs."""
        return self.builder.emit_te(function, *inputs, primfunc_name_hint=name)

    def reshape(self, value: Any, shape: Sequence[Any]) -> Any:
        return self.emit(relax.op.reshape(value, list(shape)))

    def _first_meta(self) -> Any:
        meta = self.meta
        return meta[0] if isinstance(meta, tuple | list) else meta


def dtype_of(value: Any) -> str:
    """Dtype of a Relax expression."""
    return str(value.ty.dtype)


def shape_of(value: Any) -> list[Any]:
    """Sizes of a Relax expression: integers, or TIR expressions for symbolic ones."""
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in value.ty.shape]


def static_shape(value: Any, what: str) -> list[int]:
    """Sizes of a Relax expression.

    Raises:
        Refused: when one of them is symbolic.
    """
    sizes = shape_of(value)
    if not all(isinstance(size, int) for size in sizes):
        raise Refused(f"{what} has a dynamic size: {sizes}")
    return sizes


def normal_axis(axis: int, rank: int) -> int:
    """A non-negative axis."""
    return axis + rank if axis < 0 else axis
