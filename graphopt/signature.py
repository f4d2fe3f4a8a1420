"""What a model takes and returns, as plain data. Nothing here needs torch, so a compiled bundle can use it alone."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import InputError, LoadError

__all__ = ["ConstSpec", "Dim", "Range", "Signature", "TensorSpec", "ValueSpec", "size_of"]

Dim = int | str
"""A size: a number, or an expression over named ranges such as `batch` or `2*batch`."""

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Range:
    """The sizes that a named dimension may take, both ends included; `max` is None when there is no upper end."""

    min: int = 0
    max: int | None = None

    def __contains__(self, size: int) -> bool:
        return size >= self.min and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        return f"{self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, dtype (`float32`, `int64`, ...) and dims."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class ConstSpec:
    """A value that is part of the model: a None, a flag or a number fixed when the model was captured."""

    name: str
    value: Scalar

    def __str__(self) -> str:
        return f"{self.name} = {self.value!r}"


ValueSpec = TensorSpec | ConstSpec


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in flat order, the ranges of the named dims, and the pytree structure of both as JSON text.

    `conditions` hold for all sizes that the graph is right for, such as `a*b%7 == 0` where the traced code took the
    branch for such sizes.

    `in_tree` describes `(args, kwargs)`, `out_tree` the value the model returns; both are empty strings for a model
    that takes and returns flat tuples only.
    """

    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    in_tree: str = ""
    out_tree: str = ""
    conditions: tuple[str, ...] = ()

    @property
    def tensor_inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self.inputs if isinstance(spec, TensorSpec))

    @property
    def tensor_outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self.outputs if isinstance(spec, TensorSpec))

    def __str__(self) -> str:
        names = ", ".join(f"{name} in {range_}" for name, range_ in self.ranges.items())
        text = f"({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"
        text = f"{text} where {names}" if names else text
        more = f" and {len(self.conditions) - 1} more" if len(self.conditions) > 1 else ""
        return f"{text} given {self.conditions[0]}{more}" if self.conditions else text

    def check(self, actual: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
        """Compare dtype and shape of every tensor input with its spec; return the sizes of the named dims.

        Raises:
            InputError: naming every input that does not fit, and what would.
        """
        given = list(actual)
        specs = self.tensor_inputs
        if len(given) != len(specs):
            raise InputError(
                f"the model takes {len(specs)} tensors, {len(given)} were given",
                todo=f"call it with ({', '.join(map(str, specs))})",
            )
        sizes: dict[str, int] = {}
        pairs = list(zip(specs, given, strict=True))
        wrong = [problem for spec, (dtype, shape) in pairs if (problem := self._misfit(spec, dtype, shape, sizes))] or [
            problem for spec, (_, shape) in pairs if (problem := self._misfit_expression(spec, shape, sizes))
        ]
        if wrong:
            raise InputError(
                "; ".join(wrong),
                todo="pass inputs that fit, or capture the model again with `dynamic=` for sizes that vary",
            )
        for condition in self.conditions:
            if not size_of(condition, sizes):
                raise InputError(
                    f"the model was captured for sizes with {condition}, the inputs have "
                    f"{', '.join(f'{name}={size}' for name, size in sizes.items())}",
                    todo="capture a model for these sizes apart: the code takes another branch for them",
                )
        return sizes

    def _misfit(self, spec: TensorSpec, dtype: str, shape: tuple[int, ...], sizes: dict[str, int]) -> str | None:
        if dtype != spec.dtype:
            return f"input '{spec.name}' has dtype {dtype}, the model takes {spec.dtype}"
        fits = len(shape) == len(spec.dims) and all(
            size == dim for size, dim in zip(shape, spec.dims, strict=True) if isinstance(dim, int)
        )
        if not fits:
            dims = ", ".join(map(str, spec.dims))
            return f"input '{spec.name}' has shape {list(shape)}, the model takes [{dims}]"
        for axis, (size, dim) in enumerate(zip(shape, spec.dims, strict=True)):
            if not isinstance(dim, str) or dim not in self.ranges:
                continue  # an expression: judged when all names are known
            if size not in self.ranges[dim]:
                return f"input '{spec.name}' has size {size} at axis {axis}, '{dim}' must lie in {self.ranges[dim]}"
            if sizes.setdefault(dim, size) != size:
                return f"input '{spec.name}' has {dim}={size} at axis {axis}, another input has {dim}={sizes[dim]}"
        return None

    def _misfit_expression(self, spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> str | None:
        for axis, (size, dim) in enumerate(zip(shape, spec.dims, strict=True)):
            if not isinstance(dim, str) or dim in self.ranges:
                continue
            factor, _, name = dim.partition("*")
            if name in self.ranges and name not in sizes and factor.isdigit():
                if size % int(factor):
                    return f"input '{spec.name}' has size {size} at axis {axis}, the model takes a multiple of {factor}"
                sizes[name] = size // int(factor)
            if size_of(dim, sizes) != size:
                bound = ", ".join(f"{name}={value}" for name, value in sizes.items())
                return (
                    f"input '{spec.name}' has size {size} at axis {axis}, {dim} is {size_of(dim, sizes)} with {bound}"
                )
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [_value_to_json(spec) for spec in self.inputs],
            "outputs": [_value_to_json(spec) for spec in self.outputs],
            "ranges": {name: [r.min, r.max] for name, r in self.ranges.items()},
            "in_tree": self.in_tree,
            "out_tree": self.out_tree,
            "conditions": list(self.conditions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Inverse of `to_json`.

        Raises:
            LoadError: when a field is missing or of the wrong type.
        """
        try:
            return cls(
                inputs=tuple(_value_from_json(row) for row in data["inputs"]),
                outputs=tuple(_value_from_json(row) for row in data["outputs"]),
                ranges={name: Range(low, high) for name, (low, high) in data["ranges"].items()},
                in_tree=str(data["in_tree"]),
                out_tree=str(data["out_tree"]),
                conditions=tuple(map(str, data["conditions"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError("the signature is damaged", why=f"{type(error).__name__}: {error}") from error


def _value_to_json(spec: ValueSpec) -> dict[str, Any]:
    if isinstance(spec, TensorSpec):
        return {"name": spec.name, "dtype": spec.dtype, "dims": list(spec.dims)}
    return {"name": spec.name, "value": spec.value}


def _value_from_json(row: Mapping[str, Any]) -> ValueSpec:
    if "dtype" not in row:
        return ConstSpec(str(row["name"]), row["value"])
    dims = tuple(dim if isinstance(dim, str) else int(dim) for dim in row["dims"])
    return TensorSpec(str(row["name"]), str(row["dtype"]), dims)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min, "Max": max, "Min": min}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def size_of(expression: str, sizes: Mapping[str, Any]) -> Any:
    """The value of a size expression such as `2*batch+1`, or of a condition such as `a%8 == 0`; only names, integers,
    integer arithmetic, comparisons, `max` and `min` are read.

    Raises:
        LoadError: for anything else.
    """

    def value(tree: ast.expr) -> Any:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name) and tree.id in sizes:
            return sizes[tree.id]
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            return _ARITHMETIC[type(tree.op)](value(tree.left), value(tree.right))
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -value(tree.operand)
        if isinstance(tree, ast.Compare) and len(tree.ops) == 1 and type(tree.ops[0]) in _COMPARISONS:
            return _COMPARISONS[type(tree.ops[0])](value(tree.left), value(tree.comparators[0]))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS:
            return _FUNCTIONS[tree.func.id](*(value(argument) for argument in tree.args))
        raise LoadError(f"'{expression}' is not a size over {', '.join(sizes) or 'no names'}")

    try:
        return value(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise LoadError(f"'{expression}' is not a size") from error
