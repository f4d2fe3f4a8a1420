"""Run one ONNX node: bring its inputs into the form the operator asks for, and name the node in every error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.frontends.onnx import host
from graphopt.frontends.onnx.reader import Node, Unreadable
from graphopt.frontends.onnx.registry import Input, Operator, lookup, names
from graphopt.frontends.onnx.values import Constant, Known, Refusal, Value, refuse

__all__ = ["UnknownValue", "find", "run", "unsupported"]

_REFUSED = {
    **dict.fromkeys(("If", "Loop", "Scan"), "control flow cannot be captured in one graph"),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
        "its result is random",
    ),
    **dict.fromkeys(("NonZero", "Compress", "Unique", "NonMaxSuppression"), "the size of its result depends on data"),
    **dict.fromkeys(
        ("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder"),
        "strings and images are no tensors",
    ),
}
_TODO = {
    "control flow cannot be captured in one graph": "export the model with the branch or the loop resolved",
    "its result is random": "feed the random tensor as an input",
    "the size of its result depends on data": "cut the model before this node",
    "strings and images are no tensors": "do this step outside of the model",
}


class UnknownValue(UnsupportedError):
    """A value that an operator needs while importing depends on what is fed to the model.

    `inputs` names the graph inputs that it is computed from: fixed as `constants`, they make it known.
    """

    def __init__(self, error: UnsupportedError, inputs: tuple[str, ...]) -> None:
        values = ", ".join(f"{name!r}: ..." for name in inputs)
        todo = f"fix the inputs it is computed from: load_onnx(path, constants={{{values}}})"
        super().__init__(error.what, where=error.where, why=error.why, todo=todo if inputs else error.todo)
        self.inputs = inputs


def unsupported(node: Node, opset: int, source: str, why: str, todo: str | None = None) -> UnsupportedError:
    """The error for a node, naming operator, domain, opset and node."""
    return UnsupportedError(
        f"ONNX operator {node.operator} (domain '{node.domain or 'ai.onnx'}', opset {opset}): {why}",
        where=f"{source}, {node.title}",
        todo=todo or "replace the operator in the model, or run this model with ONNX Runtime",
    )


def find(node: Node, opset: int) -> Operator:
    """The implementation of a node's operator, after checking its attributes and the number of its inputs.

    Raises:
        Refusal: no implementation, an attribute it does not know or that is missing, or a wrong number of inputs.
    """
    entry = None if node.domain else lookup(node.operator, opset)
    if entry is None:
        raise _missing(node, opset)
    for name, value in node.attributes.items():
        if name not in entry.attributes:
            raise refuse(f"attribute '{name}'={value!r} is not handled")
        if isinstance(value, Unreadable):
            raise refuse(f"attribute '{name}' is a {value.kind}, which is not handled")
    absent = [name for name, required in entry.attributes.items() if required and name not in node.attributes]
    required = sum(not item.optional for item in entry.inputs)
    if absent:
        raise refuse(f"the required attribute '{absent[0]}' is missing")
    if len(node.inputs) < required or (not entry.variadic and len(node.inputs) > len(entry.inputs)):
        raise refuse(f"it has {len(node.inputs)} inputs, {required} to {len(entry.inputs)} are expected")
    return entry


def _missing(node: Node, opset: int) -> Refusal:
    if node.domain:
        return refuse("operators of this domain are not handled", "export the model with operators of ai.onnx only")
    if node.operator.startswith(("Sequence", "Optional")) or node.operator.endswith("Sequence"):
        return refuse("sequence and optional values are not handled", "export the model with tensors only")
    if node.operator in _REFUSED:
        why = _REFUSED[node.operator]
        return refuse(why, _TODO[why])
    if node.operator in names():
        return refuse("this version of the operator is not handled", "convert the model with onnx.version_converter")
    return refuse("the operator is not handled")


def run(
    node: Node, entry: Operator, values: Sequence[Value | None], load: Callable[[Constant], Tensor]
) -> tuple[Value, ...]:
    """Execute a node: on known numbers if that is possible, else on tensors (`load` gives the tensor of a constant).

    Raises:
        Refusal: an input must be known while importing and is not, or the operator refuses.
    """
    if any(isinstance(value, Known) for value in values):
        known = [_known(value) for value in values]
        if all((k is None) == (v is None) for k, v in zip(known, values, strict=True)):
            results = host.evaluate(node.operator, known, node.attributes)
            if results is not None:
                return tuple(results)
    traced = any(isinstance(value, Tensor) or _is_array(value) for value in values)
    wanted = [*entry.inputs, *([entry.variadic] * len(values) if entry.variadic else [])]
    arguments = [
        _argument(name, value, item, load, numbers=traced)
        for name, value, item in zip(node.inputs, values, wanted, strict=False)
    ]
    extra = {"outputs": _wanted_outputs(node)} if entry.counts_outputs else {}
    result = entry.function(*arguments, **node.attributes, **extra)
    made: tuple[Value, ...] = result if isinstance(result, tuple) else (result,)
    if len(made) < _wanted_outputs(node):
        raise refuse(f"its output '{node.outputs[len(made)]}' is not handled")
    return made


def _wanted_outputs(node: Node) -> int:
    """How many outputs, up to the last one that has a name."""
    return max((i + 1 for i, name in enumerate(node.outputs) if name), default=0)


def _known(value: Value | None) -> Known | None:
    if isinstance(value, Constant):
        return value.known
    return value if isinstance(value, Known) else None


def _is_array(value: Value | None) -> bool:
    return isinstance(value, Constant) and value.tensor.ndim > 0


def _argument(name: str, value: Value | None, item: Input, load: Callable[[Constant], Tensor], *, numbers: bool) -> Any:
    if value is None:
        if item.optional:
            return None
        raise refuse(f"its input '{item.name}' is missing")
    if item.kind == "operand" and numbers and (number := _number(value)) is not None:
        return number
    known = _known(value)
    if item.kind == "either" and known is not None and len(known.numbers) == 1:
        return known
    if item.kind in ("tensor", "operand", "either"):
        return _tensor(value, load)
    if known is None:
        raise _not_known(item, name)
    if item.kind == "known":
        return known
    entries = known.numbers
    if item.kind in ("int", "float"):
        if len(entries) != 1:
            raise refuse(f"its input '{item.name}' holds {len(entries)} values instead of one")
        return entries[0]
    return tuple(entries)


def _number(value: Value) -> Any:
    """The number of a 0-d value that is known, unless only a tensor can hold it."""
    known = _known(value)
    if known is None or known.shape or known.dtype is torch.bool:
        return None
    number = known.numbers[0]
    return number if isinstance(number, int | float | torch.SymInt) else None


def _tensor(value: Value, load: Callable[[Constant], Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return load(value) if isinstance(value, Constant) else value.tensor()


def _not_known(item: Input, name: str) -> Refusal:
    return Refusal(
        f"its input '{item.name}' must be known while importing, but '{name}' depends on what is fed to the model",
        unknown=name,
    )
