"""The table of ATen operators that the TVM backend converts, and how a converter is called.

A converter is a function `(call, **arguments) -> value`, where the arguments are those of the operator's schema under
the schema's own names, defaults filled in. It names every one of them, so that none is ignored by accident:
an argument it cannot honour is refused with `Refused`. Tensors arrive as Relax expressions, sizes as integers or TIR
expressions. What it returns is cast to the dtype, and checked against the shape, that torch inferred for the node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import dlpack
from tvm import ir, relax, runtime, s_tir, te, tirx

from graphopt.backends.tvm.kernels.machine import Machine

__all__ = [
    "CONVERTERS",
    "LAYOUTS",
    "Call",
    "Converter",
    "Refused",
    "converts",
    "dtype_name",
    "element_wise",
    "precomputed",
    "wide",
]

Converter = Callable[..., Any]

CONVERTERS: dict[Any, Converter] = {}
"""Converter of each overload (and of `operator.getitem`)."""

Layout = Literal["torch", "same", "any"]

LAYOUTS: dict[Converter, Layout] = {}
"""What order of axes a converter takes (see `converts`)."""

_OUT_ELEMENT_WISE_FUSABLE = 4
"""TVM's number for functions into which element-wise functions that follow may be fused."""

_NARROW_FLOATS = ("float16", "bfloat16")


class Refused(Exception):
    """This backend cannot convert a node; the message is the reason."""


def converts(*overloads: Any, layout: Layout = "torch") -> Callable[[Converter], Converter]:
    """Register a function as the converter of the given overloads.

    Args:
        layout: the order of axes that it takes its tensors in: `torch`, the order that torch has; `same`, for
            operators that work element by element, any order as long as all tensors have the same one; `any`, whatever
            order each has, so that it gets `Ordered` values as well and may return them.
    """

    def register(function: Converter) -> Converter:
        LAYOUTS[function] = layout
        for overload in overloads:
            if overload in CONVERTERS:
                raise ValueError(f"two converters for {overload}")
            CONVERTERS[overload] = function
        return function

    return register


element_wise = functools.partial(converts, layout="same")


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32; TVM uses the same names."""
    return str(dtype).removeprefix("torch.")


def wide(dtype: str) -> str:
    """The dtype to compute in: float32 for the 16-bit floats, as torch does on a CPU.

    TVM may keep float32 between fused operators on bfloat16 where eager torch rounds in between.
    """
    return "float32" if dtype in _NARROW_FLOATS else dtype


class Call:
    """One node under conversion: its torch metadata, and the means to emit Relax code for it.

    Attributes:
        machine: what kernels are written for.
        order: the order of axes that the result is made in, when it is not torch's.
    """

    def __init__(
        self,
        builder: relax.BlockBuilder,
        node: fx.Node,
        size: Callable[[Any], Any],
        symbols: Callable[[], Sequence[Any]],
        machine: Machine,
    ) -> None:
        self.builder = builder
        self.node = node
        self._size = size
        self._symbols = symbols
        self.machine = machine
        self.order: tuple[int, ...] | None = None

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
        """Sizes of the (first) result, integers or TIR expressions, in the order that the result is made in."""
        sizes = self.sizes(self._first_meta())
        return sizes if self.order is None else [sizes[axis] for axis in self.order]

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
        if dtype_of(value) == dtype:
            return value
        if isinstance(value, ir.GenericConst):
            return precomputed(value, lambda tensor: tensor.to(getattr(torch, dtype)))
        return self.emit(relax.op.astype(value, dtype))

    def operand(self, value: Any, dtype: str) -> Any:
        """A tensor cast to `dtype`, or a number (a symbolic size too) as a 0-d tensor of that dtype."""
        if isinstance(value, bool | int | float):
            _require_in_range(value, dtype)
            return relax.const(value, dtype)
        if not isinstance(value, ir.Expr):
            raise Refused(f"an operand is not a tensor or a number: {value}")
        if not isinstance(value.ty, relax.TensorType):
            return self.compute(lambda: te.compute((), lambda: tirx.Cast(dtype, value), name="size"), name="size")
        return self.cast(value, dtype)

    def compute(
        self, function: Callable[..., te.Tensor], *inputs: Any, name: str = "compute", anchor: bool = False
    ) -> Any:
        """Emit a tensor-expression function of the inputs; an `anchor` has a kernel that also does what follows it.

        The expression may use the symbols of any size. Those that no input has as a dimension become arguments.
        (`BlockBuilder.emit_te` finds only the symbols of shapes.)
        """
        tensors = [relax.expr.te_tensor(value, {}, f"x{position}") for position, value in enumerate(inputs)]
        result = function(*tensors)
        bound = [size for value in inputs for size in value.ty.shape]
        used = tirx.analysis.undefined_vars(te.create_prim_func([*tensors, result], "int64").body)
        used = [*used, *(v for size in result.shape for v in tirx.analysis.undefined_vars(tirx.convert(size)))]
        free = [
            symbol
            for symbol in self._symbols()
            if any(symbol.same_as(v) for v in used) and not any(symbol.same_as(size) for size in bound)
        ]
        code = s_tir.renew_defs(te.create_prim_func([*tensors, *free, result], "int64"))
        if anchor:
            code = code.with_attr("op_pattern", _OUT_ELEMENT_WISE_FUSABLE)
        place = self.builder.add_func(code.without_attr("global_symbol"), name)
        kind = relax.TensorType(list(result.shape), result.dtype)
        return self.emit(relax.call_tir(place, [*inputs, *free], kind))

    def reshape(self, value: Any, shape: Sequence[Any]) -> Any:
        if isinstance(value, ir.GenericConst) and all(isinstance(size, int) for size in shape):
            return precomputed(value, lambda tensor: tensor.reshape(list(shape)))
        return self.emit(relax.op.reshape(value, list(shape)))

    def _first_meta(self) -> Any:
        meta = self.meta
        return meta[0] if isinstance(meta, tuple | list) else meta


def precomputed(constant: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A constant made from another one by torch, now: cheaper than compiling code that makes it once."""
    result = function(dlpack.from_dlpack(constant.value)).contiguous()
    return relax.const(runtime.from_dlpack(result), dtype_name(result.dtype))


def dtype_of(value: Any) -> str:
    """Dtype of a Relax expression."""
    return str(value.ty.dtype)


def shape_of(value: Any) -> list[Any]:
    """Sizes of a Relax expression: integers, or TIR expressions for symbolic ones."""
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in value.ty.shape]


def _require_in_range(value: float, dtype: str) -> None:
    if "int" not in dtype:
        return
    limits = torch.iinfo(getattr(torch, dtype))
    if value != int(value) or not limits.min <= value <= limits.max:
        raise Refused(f"the number {value} is no {dtype}")


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
