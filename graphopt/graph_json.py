"""A graph as JSON, and back. Only operators and plain values can be written, so nothing is evaluated on reading."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.errors import LoadError, UnsupportedError
from graphopt.model import Model
from graphopt.ops import SIZE_ARITHMETIC
from graphopt.printer import module_path, source_line, source_of
from graphopt.signature import TensorSpec, size_of

__all__ = ["graph_from_json", "graph_to_json"]

_NAMESPACES = ("aten", "torchvision")
_FORBIDDEN = ("from_file",)  # operators that reach outside the model
_BITWISE = ("__and__", "__or__", "__xor__", "__lshift__", "__rshift__")  # of names in underscores the only operators
_SIZE_FUNCTIONS = {f"size.{function.__name__}": function for function in SIZE_ARITHMETIC}
_TORCH_VALUES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def graph_to_json(model: Model) -> dict[str, Any]:
    """Inputs, tensors, operators and outputs by name; shapes as text, so that a reader can compare them."""
    nodes = []
    for node in model.graph.nodes:
        row: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "get_attr":
            row["target"] = str(node.target)
        elif node.op == "call_function":
            row["target"] = _target_to_json(node)
            row["args"] = [_to_json(arg) for arg in node.args]
            row["kwargs"] = {key: _to_json(arg) for key, arg in node.kwargs.items()}
            row["shape"] = model.shapes.describe(node.meta["val"])
            row |= {key: text for key, text in (("path", module_path(node)), ("source", source_line(node))) if text}
            if node.meta.get("fixed_mode"):
                row["fixed_mode"] = True
        elif node.op == "output":
            row["args"] = [_to_json(arg) for arg in node.args]
        nodes.append(row)
    return {"nodes": nodes}


def graph_from_json(data: Mapping[str, Any], model: Model, sizes: Mapping[str, torch.SymInt]) -> fx.Graph:
    """Rebuild the graph and infer every shape again.

    Raises:
        LoadError: for an operator or a value that may not be in a file, or a shape that differs from the recorded one.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    inputs = iter(model.signature.inputs)
    for row in data["nodes"]:
        kind, name = row["op"], row["name"]
        if kind == "placeholder":
            spec = next(inputs)
            if not str(name).isidentifier():  # it becomes a name in the code that torch generates
                raise LoadError(f"{name!r} cannot be the name of an input")
            node = graph.create_node("placeholder", name, name=name)
            if isinstance(spec, TensorSpec):
                node.meta["val"] = model.shapes.tensor(getattr(torch, spec.dtype), spec.dims, sizes)
            else:
                node.meta["val"] = _constant(spec.value, sizes)
        elif kind == "get_attr":
            node = graph.create_node("get_attr", row["target"], name=name)
            node.meta["val"] = model.shapes.fake(model.params[row["target"]])
        elif kind == "call_function":
            args = tuple(_from_json(arg, nodes) for arg in row["args"])
            kwargs = {key: _from_json(arg, nodes) for key, arg in row["kwargs"].items()}
            node = graph.create_node("call_function", _target_from_json(row["target"]), args, kwargs, name=name)
            node.meta |= {key: row[key] for key in ("path", "source", "fixed_mode") if key in row}
            node.meta["val"] = model.shapes.propagate(node)
            if model.shapes.describe(node.meta["val"]) != row["shape"] and "u" not in row["shape"]:
                raise LoadError(
                    f"'{name}' is recorded as {row['shape']} and is {model.shapes.describe(node.meta['val'])}"
                )
        elif kind == "output":
            node = graph.create_node(
                "output", "output", tuple(_from_json(arg, nodes) for arg in row["args"]), name=name
            )
        else:
            raise LoadError(f"'{name}' is a node of the unknown kind {kind!r}")
        nodes[name] = node
    return graph


def _constant(value: Any, sizes: Mapping[str, torch.SymInt]) -> Any:
    return size_of(value, sizes) if isinstance(value, str) and value in sizes else value


def _target_to_json(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in _NAMESPACES:
            raise UnsupportedError(f"operators of '{target.namespace}' cannot be saved in .gopt", where=source_of(node))
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if target is operator.getitem:
        return "getitem"
    return f"size.{target.__name__}"


def _target_from_json(text: str) -> Any:
    if text == "getitem":
        return operator.getitem
    if text in _SIZE_FUNCTIONS:
        return _SIZE_FUNCTIONS[text]
    namespace, _, rest = text.partition(".")
    name, _, overload = rest.partition(".")
    if namespace not in _NAMESPACES or name in _FORBIDDEN or (name.startswith("__") and name not in _BITWISE):
        raise LoadError(f"the operator '{text}' may not be in a file")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload):
        raise LoadError(f"this torch has no operator '{text}'")
    return found


def _to_json(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return {"node": arg.name}
    if arg is None or isinstance(arg, bool | int | str):
        return arg
    if isinstance(arg, float):
        return arg if arg == arg and abs(arg) != float("inf") else {"float": str(arg)}
    if isinstance(arg, complex):
        return {"complex": [arg.real, arg.imag]}
    if isinstance(arg, list):
        return [_to_json(item) for item in arg]
    if isinstance(arg, tuple):
        return {"tuple": [_to_json(item) for item in arg]}
    if isinstance(arg, slice):
        return {"slice": [_to_json(item) for item in (arg.start, arg.stop, arg.step)]}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    for key, kind in _TORCH_VALUES.items():
        if isinstance(arg, kind):
            return {key: str(arg).removeprefix("torch.")}
    raise UnsupportedError(f"an argument of type {type(arg).__name__} cannot be saved in .gopt")


def _from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (key, body), *more = value.items()
    if more:
        raise LoadError(f"a value has the keys {', '.join(value)}, not one")
    if key == "node":
        return nodes[body]
    if key == "float":
        return float(body)
    if key == "complex":
        return complex(*body)
    if key == "tuple":
        return tuple(_from_json(item, nodes) for item in body)
    if key == "slice":
        return slice(*(_from_json(item, nodes) for item in body))
    if key == "device":
        return torch.device(body)
    if key in _TORCH_VALUES:
        found = getattr(torch, str(body), None)
        if isinstance(found, _TORCH_VALUES[key]):
            return found
    raise LoadError(f"a value of the unknown kind {key!r}")
