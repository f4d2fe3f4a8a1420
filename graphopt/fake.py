"""Shapes without data: fake tensors, symbolic sizes and their propagation.

One of the two files that use torch API below the public line (the other is `export.py`): FakeTensorMode, ShapeEnv and
their rules for guards. Everything else asks here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from graphopt.errors import GraphoptError
from graphopt.signature import Dim, Range, size_of

__all__ = [
    "FakeTensor",
    "ShapeError",
    "Shapes",
    "data_dependent",
    "dim_of",
    "example_number",
    "is_symbolic",
    "shape_text",
]


class ShapeError(GraphoptError):
    """An operator cannot be applied to its inputs, or would fix a size that has to stay free."""


class Shapes:
    """The symbolic sizes of one model and the propagation of fake tensors through its operators.

    `names` maps each shape symbol to its name in the signature; `single` are those that had the size 1 in the user's
    example, which stand for 2 here as torch takes a 1 for a fixed size; `propagate` remembers what it has computed, so
    that verifying a graph again costs only the nodes that are new.
    """

    def __init__(self, mode: FakeTensorMode | None = None, names: Mapping[sympy.Symbol, str] | None = None) -> None:
        self.mode = mode or FakeTensorMode(shape_env=ShapeEnv())
        self.names: dict[sympy.Symbol, str] = dict(names or {})
        self.single: set[sympy.Symbol] = set()
        self._seen: dict[Hashable, Any] = {}
        self._refused: dict[Hashable, str] = {}

    @property
    def env(self) -> ShapeEnv:
        env = self.mode.shape_env
        assert env is not None
        return env

    def declare(self, name: str, range_: Range, example: int) -> torch.SymInt:
        """A new named size. `example` is the size it has where a number is unavoidable (cost at a default size)."""
        source = ConstantSource(name)
        symbol = self.env.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        assert isinstance(symbol, sympy.Symbol)
        self.names[symbol] = name
        size = self.env.create_symintnode(symbol, hint=example, source=source)
        assert isinstance(size, torch.SymInt)
        return size

    def number(self, size: int | torch.SymInt) -> int:
        """What a size was in the user's example, or would have been."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if self.single.isdisjoint(expr.free_symbols):
            return int(example_number(size))
        known = {s: self.env.backed_var_to_val.get(s, sympy.Integer(2)) for s in expr.free_symbols}
        return int(expr.xreplace(known | dict.fromkeys(self.single, sympy.Integer(1))))

    def tensor(self, dtype: torch.dtype, dims: Iterable[Dim], sizes: Mapping[str, torch.SymInt]) -> FakeTensor:
        """A fake tensor whose dims are numbers or expressions over the named `sizes`."""
        with self.mode:
            made = torch.empty([dim if isinstance(dim, int) else size_of(dim, sizes) for dim in dims], dtype=dtype)
        assert isinstance(made, FakeTensor)
        return made

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """The fake counterpart of a weight: same shape, strides, dtype and device, no data. Equal ones are one."""
        tensor = tensor.detach()
        key = ("fake", _fingerprint_value(tensor))
        if key not in self._seen:
            self._seen[key] = self.mode.from_tensor(tensor, static_shapes=True)
        made: FakeTensor = self._seen[key]
        return made

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, operators on fake tensors compute shapes."""
        # Without the Python dispatcher some operators (constant_pad_nd) run C++ code that fixes free sizes.
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            yield

    def key(self, node: fx.Node) -> Hashable:
        """Everything about a call that the shape of its result depends on: equal for equal calls on equal shapes."""
        return (node.target, _fingerprint(node.args), _fingerprint(node.kwargs))

    def learn(self, node: fx.Node) -> None:
        """Take the value that `node` has for what its operator makes of such inputs, as if it had been propagated."""
        self._seen.setdefault(self.key(node), node.meta["val"])

    def propagate(self, node: fx.Node) -> Any:
        """Run the operator of `node` on the fake values of its inputs.

        Raises:
            ShapeError: when the operator refuses the inputs, or fixes a symbolic size.
        """
        key = self.key(node)
        if key in self._refused:
            raise ShapeError(self._refused[key])
        if key not in self._seen:
            try:
                self._seen[key] = self._run(node)
            except ShapeError as error:
                self._refused[key] = error.what
                raise
        return self._seen[key]

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), _value_of)
        env = self.env
        guards, replacements, ranges = len(env.guards), dict(env.replacements), dict(env.var_to_range)
        assert callable(node.target)
        try:
            with self.running():
                result = node.target(*args, **kwargs)
        except Exception as error:  # any refusal of an operator is a shape error; its text is kept
            raise ShapeError(_first_line(error)) from error
        fixed = [guard.expr for guard in env.guards[guards:] if isinstance(guard.expr, sympy.Eq)]
        if fixed:
            # The environment is shared by every copy of the model, so what it just learnt is taken back.
            del env.guards[guards:]
            env.replacements, env.var_to_range = replacements, ranges
            env._replacements_version_counter += 1
            env._update_version_counter()
            env._inner_evaluate_expr.cache_clear()
            env.fake_tensor_cache.clear()
            raise ShapeError(f"it would require {' and '.join(self.name(expr) for expr in fixed)}")
        return result

    def name(self, size: object) -> str:
        """A size, or an expression over sizes, in the signature's names."""
        expr = size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size
        if isinstance(expr, sympy.Symbol):
            return self.names.get(expr, str(expr))
        if isinstance(expr, sympy.Basic):
            renamed = expr.subs({symbol: sympy.Symbol(name) for symbol, name in self.names.items()})
            return str(renamed).replace(" ", "")
        return str(expr)

    def dims(self, value: torch.Tensor) -> tuple[Dim, ...]:
        """The shape of a fake tensor as the signature writes it."""
        return tuple(dim_of(size, self) for size in value.shape)

    def describe(self, value: object) -> str:
        """A value as the printer shows it: `float32[batch, 3, 224, 224]`, `int batch`, `(..., ...)`."""
        if isinstance(value, torch.Tensor):
            return f"{dtype_name(value.dtype)}[{', '.join(map(str, self.dims(value)))}]"
        if isinstance(value, tuple | list):
            return f"({', '.join(self.describe(item) for item in value)})"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return f"{value.node.pytype.__name__} {self.name(value)}"
        return type(value).__name__


def dim_of(size: int | torch.SymInt, shapes: Shapes) -> Dim:
    """A size as plain data: a number, or an expression in the signature's names."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else shapes.name(expr)
    return int(size)


def data_dependent(value: object) -> set[sympy.Symbol]:
    """The sizes and numbers in a fake value that are known only once an operator has run."""
    if isinstance(value, tuple | list):
        return set().union(*map(data_dependent, value))
    if isinstance(value, torch.Tensor):
        return set(free_unbacked_symbols(list(value.shape)))
    return (
        set(free_unbacked_symbols(value)) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else set()
    )


def example_number(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> int | float | bool:
    """The number that a size, or what is computed from sizes, had in the example. A size that is known only once an
    operator has run is taken for two, which is neither of the special cases of sizes."""
    node = value.node
    if node.hint is not None:
        number: int | float | bool = node.hint
        return number
    known = node.shape_env.backed_var_to_val
    return node.pytype(node.expr.xreplace({s: known.get(s, sympy.Integer(2)) for s in node.expr.free_symbols}))  # type: ignore[no-any-return]  # int, float or bool


def is_symbolic(value: object) -> bool:
    """Whether a fake value has a size that is not a number."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt)


def shape_text(value: object) -> str:
    """What invariant I3 compares: dtype, device and shape of every tensor in `value`."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_expr_text(size) for size in value.shape)
        return f"{dtype_name(value.dtype)}[{sizes}]@{value.device.type}"
    if isinstance(value, tuple | list):
        return f"({', '.join(shape_text(item) for item in value)})"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _expr_text(value)
    return repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expr_text(size: object) -> str:
    expr = size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size
    if isinstance(expr, sympy.Basic) and any(str(symbol).startswith("u") for symbol in expr.free_symbols):
        return "?"  # data-dependent: every propagation makes a new symbol
    return str(expr)


def _value_of(node: fx.Node) -> Any:
    if "val" not in node.meta:
        raise ShapeError(f"'{node.name}' has no shape")
    return node.meta["val"]


def _fingerprint(arg: Any) -> Hashable:
    """Everything about an argument that the shape of the result can depend on."""
    if isinstance(arg, fx.Node):
        return _fingerprint_value(arg.meta.get("val"))
    if isinstance(arg, tuple | list):
        return tuple(_fingerprint(item) for item in arg)
    if isinstance(arg, dict):
        return tuple((key, _fingerprint(item)) for key, item in arg.items())
    if isinstance(arg, slice):
        return ("slice", _fingerprint(arg.start), _fingerprint(arg.stop), _fingerprint(arg.step))
    return (type(arg), arg)


def _fingerprint_value(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        cached: Hashable = getattr(value, "_graphopt_key", None)
        if cached is None:
            sizes = tuple(_size_key(size) for size in value.shape)
            strides = tuple(_size_key(step) for step in value.stride()) if value.layout is torch.strided else ()
            cached = ("tensor", value.dtype, value.device, sizes, strides)
            value._graphopt_key = cached  # type: ignore[attr-defined]  # computed once per fake tensor
        return cached
    if isinstance(value, tuple | list):
        return tuple(_fingerprint_value(item) for item in value)
    return ("size", _size_key(value))


def _size_key(size: Any) -> Hashable:
    key: Hashable = size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size
    return key


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
