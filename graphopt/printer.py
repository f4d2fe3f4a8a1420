"""The text form of a graph: stable, one line an operator, made to be read and to be compared."""

from __future__ import annotations

import importlib
import linecache
import operator
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = [
    "excerpt",
    "is_users",
    "module_path",
    "operator_name",
    "print_model",
    "print_node",
    "source_line",
    "source_of",
]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_NOT_THE_USERS = (
    *(str(Path(str(file)).parent) + os.sep for file in (torch.__file__, __file__, importlib.__file__)),
    "<",
)
"""How the paths of files begin that hold no line of the user's."""


def is_users(file: str) -> bool:
    """Whether a file of a stack trace is the user's own: none of torch, of graphopt, or of the import machinery."""
    return not file.startswith(_NOT_THE_USERS)


def print_model(model: Model) -> str:
    """The whole graph: inputs, tensors, operators with their shapes and module paths, outputs."""
    lines = [f"model {model.signature} {{"]
    for node in model.graph.nodes:
        if node.op == "get_attr":
            lines.append(f"  {print_node(node, model)}")
    lines += [f"  {print_node(node, model)}" for node in model.graph.nodes if node.op in ("call_function", "output")]
    lines.append("}")
    return "\n".join(lines)


def print_node(node: fx.Node, model: Model | None = None) -> str:
    """One line: `%conv = conv2d(%x, %w, None, [1, 1]) : float32[1, 8, 6, 6]  # features.0`."""
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    shape = f" : {model.shapes.describe(node.meta.get('val'))}" if model is not None else ""
    if node.op == "placeholder":
        return f"%{node.name} = input{shape}"
    if node.op == "get_attr":
        return f"%{node.name} = tensor '{node.target}'{shape}"
    args = [_value(arg) for arg in node.args] + [f"{key}={_value(arg)}" for key, arg in node.kwargs.items()]
    path = module_path(node)
    return f"%{node.name} = {operator_name(node.target)}({', '.join(args)}){shape}" + (f"  # {path}" if path else "")


def operator_name(target: Any) -> str:
    """`conv2d` for `aten.conv2d.default`, `add.Tensor` for an overload with a name, `getitem` for the builtin."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname if target._overloadname == "default" else f"{target._opname}.{target._overloadname}"
        return name if target.namespace == "aten" else f"{target.namespace}::{name}"
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", str(target))


def module_path(node: fx.Node) -> str:
    """The path of the module that called the operator, such as `features.0.conv`; empty at the top level."""
    if "path" in node.meta:
        return str(node.meta["path"])
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple | list) else str(entry) for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def source_of(node: fx.Node) -> str:
    """Where an operator comes from: node, module path and the user's own source line."""
    place = f"'{node.name}' ({operator_name(node.target)})" if node.op == "call_function" else f"'{node.name}'"
    path = module_path(node)
    if path:
        place += f" in module '{path}'"
    frame = source_line(node)
    return f"{place}\n{frame}" if frame else place


def source_line(node: fx.Node) -> str:
    """The user's own line that made the operator, as `file:line: code`; empty when it is not known."""
    return str(node.meta.get("source") or _user_frame(str(node.meta.get("stack_trace") or "")))


def _user_frame(stack: str) -> str:
    """The innermost frame of a stack trace that is the user's, as `file:line: code`."""
    own = [(match[1], int(match[2])) for match in _FRAME.finditer(stack) if is_users(match[1])]
    if not own:
        return ""
    file, line = own[-1]
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"


def excerpt(node: fx.Node, model: Model | None = None, around: int = 2) -> str:
    """The lines of the graph around `node`, which is marked by an arrow."""
    calls = [other for other in node.graph.nodes if other.op in ("call_function", "output")]
    at = calls.index(node) if node in calls else 0
    rows = calls[max(0, at - around) : at + around + 1]
    return "\n".join(f"{'->' if row is node else '  '} {print_node(row, model)}" for row in rows)


def _value(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, list | tuple):
        left, right = ("[", "]") if isinstance(arg, list) else ("(", ")")
        return f"{left}{', '.join(_value(item) for item in arg)}{right}"
    if isinstance(arg, dict):
        return f"{{{', '.join(f'{key!r}: {_value(item)}' for key, item in arg.items())}}}"
    if isinstance(arg, slice):
        return f"{_value(arg.start)}:{_value(arg.stop)}:{_value(arg.step)}"
    if isinstance(arg, torch.dtype | torch.layout | torch.memory_format):
        return str(arg).removeprefix("torch.")
    return repr(arg)
