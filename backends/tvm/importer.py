"""From a model's graph of ATen operators to a Relax module, node by node.

Sizes never travel through the graph: torch has inferred every shape as an expression over named symbols, so that each
is rebuilt as a TIR expression from the node's metadata, and nodes that compute sizes need no conversion at all.
What depends on stored tensors alone is computed by torch while importing. After each conversion the result is held
against torch's shape and cast to torch's dtype.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from tvm import ir, relax, sym

from graphopt.backend import Unsupported
from graphopt.backends.tvm import layout
from graphopt.backends.tvm.borrowed import Borrowed
from graphopt.backends.tvm.decompose import decomposed, holds_tensor
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.registry import (
    CONVERTERS,
    LAYOUTS,
    Call,
    Converter,
    Refused,
    dtype_name,
    dtype_of,
    shape_of,
)
from graphopt.backends.tvm.symbols import Symbols
from graphopt.errors import UnsupportedError
from graphopt.model import Model, output_leaves
from graphopt.ops import is_in_place

__all__ = ["Imported", "import_model"]

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
}


_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
"""Operators that only check something at run time, which the signature and the type checks do here."""


@dataclass
class Imported:
    """A Relax module with one function `main`, from tensor inputs to a tuple of the tensor outputs."""

    module: ir.IRModule
    unsupported: list[Unsupported] = field(default_factory=list)


def import_model(model: Model, machine: Machine, converters: Mapping[Any, Converter] = CONVERTERS) -> Imported:
    """Convert a model and list what cannot be converted; the module is of use when that list is empty."""
    return _Importer(decomposed(model), machine, converters).run()


class _Importer:
    def __init__(self, model: Model, machine: Machine, converters: Mapping[Any, Converter]) -> None:
        self.model = model
        self.converters = converters
        self.machine = machine
        self.builder = relax.BlockBuilder()
        self.symbols = Symbols()
        self.values: dict[fx.Node, Any] = {}
        self.plain: dict[tuple[fx.Node, int], Any] = {}
        self.stored: dict[fx.Node, Any] = {}
        self.borrowed = Borrowed()
        self.unsupported: list[Unsupported] = []
        self.analyzer = sym.Analyzer()

    def run(self) -> Imported:
        inputs = [self._input(node) for node in self.model.graph.nodes if node.op == "placeholder"]
        variables = [variable for variable in inputs if variable is not None]
        self._require_plain_sizes(variables)
        with self.builder.function("main", variables):
            with self.builder.dataflow():
                for node in self.model.graph.nodes:
                    if node.op == "get_attr":
                        self._bind(node, self.model.params[str(node.target)])
                    elif node.op == "call_function":
                        self._node(node)
                result = self.builder.emit_output(relax.Tuple(self._outputs()))
            self.builder.emit_func_output(result)
        return Imported(self.borrowed.returned(self.builder.get()), self.unsupported)

    def _input(self, node: fx.Node) -> Any:
        """The variable of an input that is a tensor. The signature checks the others, which are constants."""
        if not isinstance(node.meta["val"], torch.Tensor):
            return None
        self.values[node] = variable = relax.Var(node.name, self._type(node.meta["val"]))
        return variable

    def _bind(self, node: fx.Node, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            self._refuse(node, "a stored value is not a dense tensor of a known dtype")
            return
        self.stored[node] = tensor.detach()

    def _require_plain_sizes(self, variables: Sequence[Any]) -> None:
        """The compiled function learns a symbol from an input dimension that is the symbol alone."""
        plain = [size for variable in variables for size in variable.ty.shape]
        missing = [name for name, symbol in self.symbols.items() if not any(symbol.same_as(size) for size in plain)]
        if missing:
            raise UnsupportedError(
                f"no input has the dynamic size {', '.join(missing)} as a dimension of its own",
                where="the model's inputs",
                todo="name that dimension itself in `dynamic=` when capturing, or make it static",
            )

    def _type(self, meta: torch.Tensor) -> Any:
        return relax.TensorType([self.symbols.size(size) for size in meta.shape], dtype_name(meta.dtype))

    def _node(self, node: fx.Node) -> None:
        meta = node.meta["val"]
        if node.target is operator.getitem and not node.users:
            return
        if not holds_tensor(meta):
            if meta is None and not any(check in str(node.target) for check in _CHECKS):
                self._refuse(node, "it returns nothing that a compiled graph could hold")
            return
        if isinstance(meta, torch.Tensor) and node.target in _FILLERS and _computable(node):
            self.stored[node] = torch.full(meta.shape, _FILLERS[node.target], dtype=meta.dtype)
            return
        if _computable(node) and all(argument in self.stored for argument in node.all_input_nodes):
            self.stored[node] = self._computed(node)
            return
        try:
            call = Call(self.builder, node, self.symbols.size, self.symbols.variables, self.machine)
            self.values[node] = self._settle(node, self._convert(call), meta)
        except Refused as refusal:
            self._refuse(node, str(refusal))

    def _convert(self, call: Call) -> Any:
        target = call.node.target
        converter = self.converters.get(target)
        if converter is None and is_in_place(call.node):
            raise Refused("it writes to a tensor; a compiled graph has no state")
        if converter is None:
            raise Refused("no conversion to TVM, and torch has no decomposition that helps")
        for value in (call.meta, *(n.meta["val"] for n in call.node.all_input_nodes)):
            self._check_dtypes(value)
        if target is operator.getitem:
            (source,) = call.node.all_input_nodes
            return converter(call, self._tensors(source), call.node.args[1])
        takes = LAYOUTS[converter]
        if takes == "any":
            return converter(call, **self._arguments(call.node, self._tensors))
        if takes == "same":
            return self._element_wise(call, converter)
        return converter(call, **self._arguments(call.node, self._plain))

    def _element_wise(self, call: Call, converter: Converter) -> Any:
        """Convert in the order of axes that the operands have, if they have one of their own."""
        tensors = [self._tensors(argument) for argument in call.node.all_input_nodes if self._is_tensor(argument)]
        rank = len(call.meta.shape) if isinstance(call.meta, torch.Tensor) else -1
        order = layout.common_order(tensors, rank)
        if order is None or not all(isinstance(t, layout.Ordered) or hasattr(t, "ty") for t in tensors):
            return converter(call, **self._arguments(call.node, self._plain))
        call.order = order

        def ready(node: fx.Node) -> Any:
            return layout.broadcast_ready(call, self._tensors(node), order)

        return layout.Ordered(self.builder.emit(converter(call, **self._arguments(call.node, ready))), order)

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(node.meta["val"], torch.Tensor)

    def _plain(self, node: fx.Node) -> Any:
        """The Relax value of a node with its axes in torch's order."""
        value = self._tensors(node)
        if isinstance(value, tuple):
            return tuple(self._plain_part(node, i, part) for i, part in enumerate(value))
        return self._plain_part(node, 0, value)

    def _plain_part(self, node: fx.Node, number: int, value: Any) -> Any:
        if not isinstance(value, layout.Ordered):
            return value
        if (node, number) not in self.plain:
            call = Call(self.builder, node, self.symbols.size, self.symbols.variables, self.machine)
            self.plain[node, number] = layout.plain(call, value)
        return self.plain[node, number]

    def _check_dtypes(self, meta: Any) -> None:
        for tensor in meta if isinstance(meta, tuple | list) else (meta,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype not in _DTYPES:
                raise Refused(f"dtype {dtype_name(tensor.dtype)}")

    def _arguments(self, node: fx.Node, tensors: Callable[[fx.Node], Any]) -> dict[str, Any]:
        """The arguments of a node under the names of its schema; those left at their default are left out."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]  # an operator overload
        given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
        return {name: self._value(value, tensors) for name, value in given.items()}

    def _value(self, value: Any, tensors: Callable[[fx.Node], Any]) -> Any:
        if isinstance(value, list | tuple):
            return [self._value(item, tensors) for item in value]
        if not isinstance(value, fx.Node):
            return value
        meta = value.meta["val"]
        return tensors(value) if holds_tensor(meta) else self.symbols.size(meta)

    def _tensors(self, node: fx.Node) -> Any:
        """The Relax value of a node; a stored tensor becomes a constant when it is first asked for."""
        if node not in self.values:
            stored, constant = self.stored[node], self.borrowed.constant
            several = isinstance(stored, tuple | list)
            self.values[node] = tuple(map(constant, stored)) if several else constant(stored)
        return self.values[node]

    def _computed(self, node: fx.Node) -> Any:
        """What torch computes for a node of stored tensors."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: self.stored[argument])
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]  # an operator overload

    def _settle(self, node: fx.Node, value: Any, meta: Any) -> Any:
        """Emit the converted value in torch's dtype, and check its shape against torch's."""
        if isinstance(value, tuple):
            return tuple(v if v is None else self._settle(node, v, m) for v, m in zip(value, meta, strict=True))
        if isinstance(value, layout.Ordered):
            stored = meta.permute(value.order)
            made = dataclasses.replace(value, value=self._settle(node, value.value, stored))
            return made if isinstance(made, layout.Padded) else layout.settled(made)
        result = value if isinstance(value, relax.Var | ir.GenericConst) else self.builder.emit(value)
        dtype = dtype_name(meta.dtype)
        if dtype_of(result) != dtype:
            result = self.builder.emit(relax.op.astype(result, dtype))
        return self._checked_shape(result, self._type(meta))

    def _checked_shape(self, value: Any, expected: Any) -> Any:
        pairs = list(zip(shape_of(value), expected.shape, strict=False))
        if len(shape_of(value)) != len(expected.shape) or any(
            isinstance(a, int) and isinstance(b, ir.Expr) and str(b).isdigit() and a != int(b) for a, b in pairs
        ):
            raise Refused(f"TVM infers the shape {shape_of(value)} where torch has {list(expected.shape)}")
        if all(self.analyzer.can_prove_equal(a, b) for a, b in pairs):
            return value
        return self.builder.match_cast(value, expected)

    def _refuse(self, node: fx.Node, why: str) -> None:
        self.unsupported.append(Unsupported(_operator_name(node), node.name, why))
        self._stand_in(node)

    def _stand_in(self, node: fx.Node) -> None:
        """Give a refused node a value of the right type, so that the walk finds everything there is to refuse."""
        meta = node.meta.get("val")
        if isinstance(meta, tuple | list):
            self.values[node] = tuple(self._zeros(m) for m in meta)
        elif isinstance(meta, torch.Tensor):
            self.values[node] = self._zeros(meta)

    def _zeros(self, meta: Any) -> Any:
        if not isinstance(meta, torch.Tensor) or meta.dtype not in _DTYPES:
            return None
        return self.builder.emit(relax.op.zeros([self.symbols.size(s) for s in meta.shape], dtype_name(meta.dtype)))

    def _outputs(self) -> list[Any]:
        results = []
        for leaf in output_leaves(self.model.graph):
            if not isinstance(leaf, fx.Node):
                continue
            if isinstance(leaf.meta["val"], torch.Tensor):
                results.append(self._plain(leaf))
            else:
                self._refuse(leaf, "an output is a size, not a tensor")
        return results


_FILLERS: dict[Any, int] = {
    torch.ops.aten.new_zeros.default: 0,
    torch.ops.aten.new_ones.default: 1,
    torch.ops.aten.zeros_like.default: 0,
    torch.ops.aten.ones_like.default: 1,
}
"""Operators that take a tensor for its dtype and shape alone, and what they fill the result with."""

_LARGEST_COMPUTED = 1 << 20
"""Elements that computing ahead may make out of fewer, such as a mask out of nothing."""


def _computable(node: fx.Node) -> bool:
    """Whether torch can compute a node ahead: a pure, unrandom operator whose result has a fixed, moderate size."""
    if node.target is not operator.getitem:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
    arguments = [] if node.target in _FILLERS else node.all_input_nodes
    given = [meta for argument in arguments for meta in _flat(argument.meta["val"])]
    made = _flat(node.meta["val"])
    if not all(_is_static(meta) and meta.dtype in _DTYPES for meta in (*given, *made)):
        return False
    return sum(m.numel() for m in made) <= max(sum(m.numel() for m in given), _LARGEST_COMPUTED)


def _flat(meta: Any) -> list[torch.Tensor]:
    return [m for m in (meta if isinstance(meta, tuple | list) else [meta]) if isinstance(m, torch.Tensor)]


def _is_static(meta: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in meta.shape)


def _operator_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op
