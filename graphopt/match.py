"""Patterns over the graph. A match binds names to nodes; a failed match says which node did not fit and why.

pattern = Op(aten.batch_norm.default, input=Op(aten.conv2d.default, name="conv", sole_user=True), training=False)
found = match(pattern, node)
if not found:
    rw.skip(node, found.reason)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.ops import argument
from graphopt.printer import operator_name
from graphopt.rewriter import Node

__all__ = ["Anything", "Match", "NoMatch", "Op", "Tensor", "match"]


@dataclass(frozen=True)
class Match(Mapping[str, Node]):
    """The nodes that the named parts of a pattern met."""

    nodes: Mapping[str, Node]

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class NoMatch:
    """Where and why a pattern did not fit. `depth` is 0 when already the node itself is of another kind."""

    reason: str
    depth: int

    def __bool__(self) -> bool:
        return False


class Op:
    """A call of one of `targets` whose named arguments fit; arguments that are not named may be anything.

    An argument is a pattern (`Op`, `Tensor`, `Anything`) or a plain value that has to be equal. With `sole_user` the
    value may be read by nothing but the operator above it in the pattern.
    """

    def __init__(self, /, *targets: Any, name: str | None = None, sole_user: bool = False, **arguments: Any) -> None:
        self.targets, self.name, self.sole_user, self.arguments = targets, name, sole_user, arguments

    def describe(self) -> str:
        return " or ".join(sorted({operator_name(target) for target in self.targets}))


@dataclass(frozen=True)
class Tensor:
    """A weight, buffer or constant; with `optional` also None."""

    name: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Anything:
    """Any computed or given value."""

    name: str


@dataclass
class _State:
    nodes: dict[str, Node] = field(default_factory=dict)


def match(pattern: Op, node: Node) -> Match | NoMatch:
    """Try `pattern` with its root at `node`."""
    state = _State()
    failure = _match_op(pattern, node, None, state, 0)
    return failure if failure is not None else Match(state.nodes)


def _match(pattern: Any, value: Any, user: Node, name: str, state: _State, depth: int) -> NoMatch | None:
    if isinstance(pattern, Op):
        if not isinstance(value, Node):
            return NoMatch(f"the {name} of '{user.name}' is {value!r}, not a call of {pattern.describe()}", depth)
        return _match_op(pattern, value, user, state, depth)
    if isinstance(pattern, Tensor):
        if value is None and pattern.optional:
            return None
        if not isinstance(value, Node) or value.op != "get_attr":
            return NoMatch(f"the {name} of '{user.name}' is computed, not a stored tensor", depth)
        return _bind(pattern.name, value, state, depth)
    if isinstance(pattern, Anything):
        if not isinstance(value, Node):
            return NoMatch(f"the {name} of '{user.name}' is the number {value!r}", depth)
        return _bind(pattern.name, value, state, depth)
    if value != pattern or isinstance(value, bool) != isinstance(pattern, bool):
        return NoMatch(f"{name} of '{user.name}' is {value!r}, not {pattern!r}", depth)
    return None


def _match_op(pattern: Op, node: Node, user: Node | None, state: _State, depth: int) -> NoMatch | None:
    if node.op != "call_function" or node.target not in pattern.targets:
        kind = operator_name(node.target) if node.op == "call_function" else f"the {node.op} '{node.target}'"
        return NoMatch(f"'{node.name}' is {kind}, not {pattern.describe()}", depth)
    if pattern.sole_user and user is not None:
        others = [other.name for other in node.users if other is not user]
        if others:
            return NoMatch(f"'{node.name}' is also used by '{others[0]}'", depth)
    for name, part in pattern.arguments.items():
        failure = _match(part, argument(node, name), node, name, state, depth + 1)
        if failure is not None:
            return failure
    return _bind(pattern.name, node, state, depth)


def _bind(name: str | None, node: Node, state: _State, depth: int) -> NoMatch | None:
    if name is None:
        return None
    bound = state.nodes.setdefault(name, node)
    return None if bound is node else NoMatch(f"'{name}' is both '{bound.name}' and '{node.name}'", depth)
