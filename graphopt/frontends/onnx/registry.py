"""The table of ONNX operators: which Python function implements which operator in which opsets.

An operator is a typed function. Its positional parameters are the ONNX inputs, in order, their annotations saying how
each is wanted; its keyword-only parameters are the ONNX attributes, and one that the function does not have is
refused. `@operator("Softmax", since=13)` makes the function the one for opset 13 and later, `until=12` for opset 12
and before.

    Tensor                  a tensor
    Operand                 a tensor, or a number when the value is a 0-d constant
    Ints, int               integers that must be known while importing (a dynamic size is a torch.SymInt)
    Floats, float           floats that must be known while importing
    Known                   any array that must be known while importing, with its dtype
    Tensor | Known          the one or the other, a known one being a single number
    X | None                an input that may be left out
    *xs: Tensor             any number of inputs
    outputs: Outputs        keyword-only: how many outputs the node asks for, instead of an attribute
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NewType, TypeVar

from torch import Tensor

from graphopt.frontends.onnx.values import Floats, Ints, Known, Operand

__all__ = ["NEWEST_OPSET", "OLDEST_OPSET", "Input", "Operator", "Outputs", "lookup", "names", "operator", "registered"]

OLDEST_OPSET = 7
NEWEST_OPSET = 28

Outputs = NewType("Outputs", int)
Function = TypeVar("Function", bound=Callable[..., Any])

_KINDS: Mapping[Any, str] = {
    Tensor: "tensor", Operand: "operand", Ints: "ints", int: "int", Floats: "floats", float: "float", Known: "known",
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One input of an operator: its name, how it is wanted, and whether it may be left out."""

    name: str
    kind: str
    optional: bool


@dataclass(frozen=True)
class Operator:
    """An implementation with what its signature says."""

    name: str
    since: int
    until: int
    function: Callable[..., Any]
    inputs: tuple[Input, ...]
    variadic: Input | None
    attributes: Mapping[str, bool]
    """Attribute name to whether it is required."""
    counts_outputs: bool

    @property
    def constant_inputs(self) -> tuple[str, ...]:
        return tuple(i.name for i in self.inputs if i.kind not in ("tensor", "operand", "either"))


_TABLE: dict[str, list[Operator]] = {}


def operator(name: str, *, since: int = OLDEST_OPSET, until: int = NEWEST_OPSET) -> Callable[[Function], Function]:
    """Register a function as operator `name` of the default ONNX domain for the opsets `since` to `until`.

    Raises:
        ValueError: when the opsets overlap those of another registration.
    """

    def register(function: Function) -> Function:
        entry = _describe(name, since, until, function)
        others = _TABLE.setdefault(name, [])
        if any(entry.since <= other.until and other.since <= entry.until for other in others):
            raise ValueError(f"operator {name} is registered twice for an opset in {since}..{until}")
        others.append(entry)
        return function

    return register


def _describe(name: str, since: int, until: int, function: Callable[..., Any]) -> Operator:
    hints = typing.get_type_hints(function)
    inputs: list[Input] = []
    variadic: Input | None = None
    attributes: dict[str, bool] = {}
    counts = False
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if hints[key] is Outputs:
                counts = True
            else:
                attributes[key] = parameter.default is parameter.empty
        elif parameter.kind is parameter.VAR_POSITIONAL:
            variadic = Input(key, *_kind(hints[key]))
        else:
            inputs.append(Input(key, *_kind(hints[key])))
    return Operator(name, since, until, function, tuple(inputs), variadic, attributes, counts)


def _kind(hint: Any) -> tuple[str, bool]:
    if hint in _KINDS:
        return _KINDS[hint], False
    if hint == Tensor | Known:
        return "either", False
    parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return _KINDS[parts[0] if len(parts) == 1 else Operand], True


def lookup(name: str, opset: int) -> Operator | None:
    """The implementation of an operator in an opset, or None."""
    return next((entry for entry in _TABLE.get(name, ()) if entry.since <= opset <= entry.until), None)


def registered() -> tuple[Operator, ...]:
    """Every registration, by name and opset."""
    return tuple(entry for name in sorted(_TABLE) for entry in sorted(_TABLE[name], key=lambda e: e.since))


def names() -> frozenset[str]:
    """The operators that have an implementation in some opset."""
    return frozenset(_TABLE)
