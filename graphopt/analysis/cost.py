"""What a model costs: multiply-accumulates, parameters, bytes moved and memory, by node, by module and in total.

Counted from shapes alone, so a number here is a property of the graph and not of a machine:

- `macs`: multiply-accumulates of convolutions, matrix products, attention and recurrent layers
- `operations`: arithmetic of everything else, roughly (see `OpInfo.work`)
- `parameters`: elements of the parameters that the graph reads, tied ones once
- `weight_bytes`: bytes of the parameters, buffers and constants that it reads, tied ones once
- `moved_bytes`: activations read and written and weights read by every operator, as if each ran by itself; a view
  moves none; a lookup reads as much of its table as it returns
- `peak_bytes`: most bytes of activations alive at once (see `lifetimes`), weights left out

With free sizes the numbers are expressions in the signature's names. A maximum over expressions has no simple form,
so the peak is then the expression for the step at which it lies at the sizes of the example inputs; `Cost.at` looks
for the step again.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.fx import Node

from graphopt.analysis.lifetimes import Lifetime, lifetimes, peak_step
from graphopt.analysis.sizes import Evaluator, Renamer, Sum, Volumes, total
from graphopt.errors import UsageError
from graphopt.export import usual_sizes
from graphopt.mode import is_running_statistic
from graphopt.ops import Indexed, Kind, OpInfo, Size, argument, is_view, lookup, product
from graphopt.params import ParamKind

if TYPE_CHECKING:
    from graphopt.fake import Shapes
    from graphopt.model import Model

__all__ = ["Cost", "ModuleCost", "NodeCost", "cost"]


@dataclass(frozen=True)
class NodeCost:
    """One call. `macs` is None for an operator that is not in the table. `weights` are the names of what it reads."""

    name: str
    operator: str
    module: str
    macs: Size | None
    operations: Size
    moved_bytes: Size
    weights: tuple[str, ...]


@dataclass(frozen=True)
class ModuleCost:
    """One module of the user's model with everything inside it; weights read twice within it count once."""

    type: str
    macs: Size
    operations: Size
    parameters: int
    weight_bytes: int
    moved_bytes: Size


@dataclass(frozen=True)
class Cost:
    """The cost of a model. Sizes are ints where the shapes are fixed, otherwise sympy expressions in named sizes.

    `operators` counts nodes by operator; `barriers` those among them that are not in the operator table, whose
    multiply-accumulates are unknown and not part of `macs`. `names` are the free sizes.
    """

    macs: Size
    operations: Size
    parameters: int
    weight_bytes: int
    moved_bytes: Size
    peak_bytes: Size
    nodes: tuple[NodeCost, ...]
    modules: Mapping[str, ModuleCost]
    operators: Mapping[str, int]
    barriers: Mapping[str, int]
    names: tuple[str, ...]
    buffers: tuple[Lifetime, ...] = field(repr=False)

    def at(self, **sizes: int) -> Cost:
        """The same with numbers for every free size.

        Raises:
            UsageError: a size is missing, or is not one of `names`.
        """
        if set(sizes) != set(self.names):
            raise UsageError(
                f"sizes given for {', '.join(sizes) or 'nothing'}, free sizes are {', '.join(self.names) or 'none'}",
                todo="give each free size one number",
            )
        value = Evaluator(sizes)
        buffers = tuple(replace(buffer, bytes=value(buffer.bytes)) for buffer in self.buffers)
        return replace(
            _evaluated(self, value),
            peak_bytes=_peak(buffers, value),
            nodes=tuple(_evaluated(node, value) for node in self.nodes),
            modules={path: _evaluated(module, value) for path, module in self.modules.items()},
            names=(),
            buffers=buffers,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; an expression becomes its text."""
        return {
            **{name: _plain(getattr(self, name)) for name in (*_SIZES, "peak_bytes", "parameters", "weight_bytes")},
            "operators": dict(self.operators),
            "barriers": dict(self.barriers),
            "names": list(self.names),
            "modules": {path: _row(module) for path, module in self.modules.items()},
            "nodes": [_row(node) for node in self.nodes],
        }

    def __str__(self) -> str:
        rows = [
            ("multiply-accumulates", _text(self.macs)),
            ("other operations", _text(self.operations)),
            ("parameters", _text(self.parameters)),
            ("weights", f"{_text(self.weight_bytes)} bytes"),
            ("moved", f"{_text(self.moved_bytes)} bytes"),
            ("peak of activations", f"{_text(self.peak_bytes)} bytes"),
        ]
        rows += [("unknown operator", f"{name} ({count} times)") for name, count in self.barriers.items()]
        return "\n".join(f"{label:<22}{text}" for label, text in rows)


_SIZES = ("macs", "operations", "moved_bytes")
_Row = TypeVar("_Row", Cost, NodeCost, ModuleCost)


def cost(model: Model, at: Mapping[str, int] | None = None) -> Cost:
    """Count what one call of the model costs, with numbers for its free sizes from `at` when that is given.

    Raises:
        UsageError: `at` does not name exactly the free sizes.
    """
    volumes = Volumes(rename := Renamer(model.shapes.names))
    count = _Counter(model.shapes, rename, volumes)
    nodes = tuple(_node_cost(node, count) for node in model.graph.nodes if _counts(node))
    buffers = lifetimes(model.graph, volumes.bytes)
    weights = {name for node in nodes for name in node.weights}
    parameters, weight_bytes = _weigh(model, weights)
    operators = Counter(node.operator for node in nodes)
    barriers = Counter(node.operator for node in nodes if node.macs is None)
    found = Cost(
        macs=Sum(node.macs for node in nodes if node.macs is not None).total(),
        operations=Sum(node.operations for node in nodes).total(),
        parameters=parameters,
        weight_bytes=weight_bytes,
        moved_bytes=Sum(node.moved_bytes for node in nodes).total(),
        peak_bytes=_peak(buffers, Evaluator(usual_sizes(model))),
        nodes=nodes,
        modules=_modules(model, nodes),
        operators=dict(operators.most_common()),
        barriers=dict(barriers.most_common()),
        names=_free_names(buffers),
        buffers=buffers,
    )
    return found if at is None else found.at(**at)


def _counts(node: Node) -> bool:
    """Whether the node works on tensors; picking an output, arithmetic on sizes and counting batches are free."""
    if node.op != "call_function" or node.target is operator.getitem or is_running_statistic(node):
        return False
    info = lookup(node.target)
    return info is None or info.kind is not Kind.SIZE


def _node_cost(node: Node, count: _Counter) -> NodeCost:
    stack = list(_module_stack(node))
    macs, operations, moved_bytes = count(node)
    return NodeCost(
        name=node.name,
        operator=str(node.target),
        module=stack[-1][0] if stack else "",
        macs=macs,
        operations=operations,
        moved_bytes=moved_bytes,
        weights=tuple(str(source.target) for source in _reads(node) if source.op == "get_attr"),
    )


def _reads(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]


class _Counter:
    """Multiply-accumulates, operations and bytes moved of a call; equal calls on equal shapes are counted once."""

    def __init__(self, shapes: Shapes, rename: Renamer, volumes: Volumes) -> None:
        self.shapes, self.rename, self.volumes = shapes, rename, volumes
        self._seen: dict[Hashable, tuple[Size | None, Size, Size]] = {}

    def __call__(self, node: Node) -> tuple[Size | None, Size, Size]:
        reads = _reads(node)
        key = (self.shapes.key(node), len(reads))  # x * x reads half of what x * y does
        if key not in self._seen:
            info = lookup(node.target)
            macs = None if info is None else self.rename(info.macs(node)) if info.macs else 0
            moved = 0 if is_view(node) else _moved(node, info, reads, self.volumes)
            self._seen[key] = (macs, _operations(node, info, reads, self.volumes), moved)
        return self._seen[key]


def _operations(node: Node, info: OpInfo | None, reads: list[Node], volumes: Volumes) -> Size:
    """`work` for every element of the largest tensor read or made; where sizes are free, the largest if all are 2."""
    if info is None or not info.work:
        return 0
    elements = [volume.elements for source in (*reads, node) for volume in volumes(source)]
    return product((info.work, max(elements, key=_order)))


@lru_cache(maxsize=65536)
def _order(size: Size) -> int:
    return size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, 2)))


def _moved(node: Node, info: OpInfo | None, reads: list[Node], volumes: Volumes) -> Size:
    table = None
    if info is not None and isinstance(info.axes, Indexed) and info.axes.values is None:
        table = argument(node, info.axes.table)
    sources = [node if source is table else source for source in reads]
    return total((volumes.bytes(node), *(volumes.bytes(source) for source in sources)))


def _module_stack(node: Node) -> Iterator[tuple[str, str]]:
    """Path and class of the modules that the call belongs to, from the outermost inwards.

    A model that was loaded from a file knows the path of the innermost only: the outer ones follow, without classes.
    """
    stack = node.meta.get("nn_module_stack") or {}
    for path, kind in stack.values():
        yield path, kind if isinstance(kind, str) else kind.__name__
    if not stack:
        yield "", ""
        parts = str(node.meta.get("path") or "").split(".")
        yield from ((".".join(parts[: end + 1]), "") for end in range(len(parts)) if parts[0])


def _weigh(model: Model, names: set[str]) -> tuple[int, int]:
    """Elements of the parameters and bytes of all tensors under `names`, each tensor once."""
    tensors = {id(tensor): (name, tensor) for name in sorted(names) for tensor in [model.params[name]]}
    parameters = sum(t.numel() for name, t in tensors.values() if model.params.kind(name) is ParamKind.PARAMETER)
    return parameters, sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())


def _modules(model: Model, nodes: tuple[NodeCost, ...]) -> dict[str, ModuleCost]:
    stacks = {node.name: tuple(_module_stack(node)) for node in model.graph.nodes if node.op == "call_function"}
    calls: dict[tuple[tuple[str, str], ...], list[NodeCost]] = {}
    for node in nodes:
        calls.setdefault(stacks[node.name], []).append(node)
    types: dict[str, str] = {}
    sums: dict[str, dict[str, Sum]] = {}
    weights: dict[str, set[str]] = {}
    for stack, members in calls.items():
        parts = {name: Sum(getattr(node, name) or 0 for node in members) for name in _SIZES}
        reads = {name for node in members for name in node.weights}
        for path, kind in dict(stack).items():
            types.setdefault(path, kind)
            rows = sums.setdefault(path, {name: Sum() for name in _SIZES})
            for name, part in parts.items():
                rows[name].merge(part)
            weights.setdefault(path, set()).update(reads)
    weighed = {path: _weigh(model, weights[path]) for path in types}
    return {
        path: ModuleCost(
            type=kind,
            parameters=weighed[path][0],
            weight_bytes=weighed[path][1],
            **{name: sums[path][name].total() for name in _SIZES},
        )
        for path, kind in types.items()
    }


def _peak(buffers: tuple[Lifetime, ...], measure: Callable[[Size], int]) -> Size:
    step = peak_step(buffers, measure)
    return Sum(buffer.bytes for buffer in buffers if buffer.first <= step <= buffer.last).total()


def _free_names(buffers: tuple[Lifetime, ...]) -> tuple[str, ...]:
    expressions = {buffer.bytes for buffer in buffers if not isinstance(buffer.bytes, int)}
    return tuple(sorted({str(symbol) for expression in expressions for symbol in expression.free_symbols}))


def _evaluated(row: _Row, value: Evaluator) -> _Row:
    sizes: dict[str, Any] = {name: getattr(row, name) for name in _SIZES}
    changes: dict[str, Any] = {name: size if size is None else value(size) for name, size in sizes.items()}
    return replace(row, **changes)


def _row(row: NodeCost | ModuleCost) -> dict[str, Any]:
    return {name: _plain(item) for name, item in vars(row).items()}


def _plain(item: Any) -> Any:
    if isinstance(item, tuple):
        return list(item)
    return item if isinstance(item, (int, str, type(None))) else str(item)


def _text(size: Size) -> str:
    return f"{size:,}" if isinstance(size, int) else str(size)
