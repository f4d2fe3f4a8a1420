"""A graph as plain rows, made to be compared: operators with canonical arguments, operands by slot, shapes as text.

Nothing in a row depends on what nodes are called or on the order in which independent nodes are listed; names and
paths are kept beside it to break ties and to be shown.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from graphopt.model import Model, output_leaves
from graphopt.ops import arguments, is_commutative, lookup
from graphopt.printer import module_path, operator_name, source_line

__all__ = ["Item", "ItemKind", "Operand", "View", "family", "literal", "view_of"]

ItemKind = Literal["input", "tensor", "call", "output"]
Operand = tuple[str, int]
"""The slot of a call, such as `weight` or `tensors[2]`, and the number of the item that fills it."""

_HOLE = "%"
"""Stands in an argument for a value that is computed."""

_FAMILIES = {
    "matrix product": ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm"),
    "convolution": ("conv1d", "conv2d", "conv3d", "convolution"),
    "lookup": ("embedding", "index.Tensor", "index_select"),
    "batch norm": ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
    "layer norm": ("layer_norm", "native_layer_norm"),
    "shape": ("view", "reshape", "flatten.using_ints", "_unsafe_view", "unflatten.int", "squeeze.dim", "unsqueeze"),
    "transposition": ("transpose.int", "permute", "t", "movedim.int"),
}
_FAMILY_OF = {name: kind for kind, names in _FAMILIES.items() for name in names}


@dataclass(slots=True)
class Item:
    """One node.

    Attributes:
        operator: `conv2d`; empty for what is no call.
        attributes: arguments that are no tensors, by schema name, defaults filled in.
        sizes: those attributes that only repeat the size of an axis.
        operands: what it reads, by slot, in schema order.
        value: dtype and shape of what it makes, sizes under the model's own names.
        shape: the same with free sizes numbered in order of the inputs, so that their names do not matter.
        tensor: the name of the weight, buffer or constant that a `tensor` item stands for.
    """

    index: int
    kind: ItemKind
    name: str
    operator: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    sizes: frozenset[str] = frozenset()
    operands: tuple[Operand, ...] = ()
    commutative: bool = False
    value: str = ""
    shape: str = ""
    path: str = ""
    source: str = ""
    tensor: str = ""


@dataclass(slots=True)
class View:
    """The rows of one model in topological order; `users` are the readers of each, with the slot they read it in."""

    model: Model
    items: list[Item]
    users: list[list[Operand]]
    output: int

    def calls(self) -> Iterator[Item]:
        return (item for item in self.items if item.kind == "call")

    def inputs(self) -> list[Item]:
        return [item for item in self.items if item.kind == "input"]

    def data_operands(self, index: int) -> Iterator[Operand]:
        """What an item reads that is computed or given, stored tensors left out."""
        items = self.items
        return ((slot, source) for slot, source in items[index].operands if items[source].kind != "tensor")

    def tensors(self, index: int) -> dict[str, Item]:
        """The stored tensors that an item reads, by slot."""
        items = self.items
        return {slot: items[source] for slot, source in items[index].operands if items[source].kind == "tensor"}


def view_of(model: Model) -> View:
    """The rows of a model."""
    builder = _Builder(model)
    numbers: dict[fx.Node, int] = {}
    items: list[Item] = []
    for node in model.graph.nodes:
        item = builder.item(node, len(items), numbers)
        numbers[node] = item.index
        items.append(item)
    users: list[list[Operand]] = [[] for _ in items]
    for item in items:
        for slot, source in item.operands:
            users[source].append((slot, item.index))
    return View(model, items, users, len(items) - 1)


class _Builder:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.values: dict[int, tuple[str, str]] = {}
        self.texts: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        for spec in model.signature.tensor_inputs:
            for name in re.findall(r"[^\W\d]\w*", " ".join(map(str, spec.dims))):
                self.keys.setdefault(name, f"size{len(self.keys)}")

    def item(self, node: fx.Node, index: int, numbers: dict[fx.Node, int]) -> Item:
        if node.op == "output":
            return self._output(node, index, numbers)
        value, shape = self._value(node.meta.get("val"))
        if node.op == "placeholder":
            return Item(index, "input", node.name, value=value, shape=shape)
        if node.op == "get_attr":
            return Item(index, "tensor", node.name, value=value, shape=shape, tensor=str(node.target))
        attributes: dict[str, Any] = {}
        operands: list[Operand] = []
        for slot, argument in _arguments(node):
            _split(slot, argument, numbers, attributes, operands)
        if attributes.get("scale", 0) is None and (scale := _default_scale(node)) is not None:
            attributes["scale"] = scale  # pruning spells it out, and it stays the same
        return Item(
            index,
            "call",
            node.name,
            operator=operator_name(node.target),
            attributes=attributes,
            sizes=_size_arguments(node),
            operands=tuple(operands),
            commutative=isinstance(node.target, torch._ops.OpOverload) and is_commutative(node),
            value=value,
            shape=shape,
            path=module_path(node),
            source=source_line(node),
        )

    def _output(self, node: fx.Node, index: int, numbers: dict[fx.Node, int]) -> Item:
        operands: list[Operand] = []
        attributes: dict[str, Any] = {}
        for position, leaf in enumerate(output_leaves(node.graph)):
            _split(f"[{position}]", leaf, numbers, attributes, operands)
        return Item(index, "output", node.name, attributes=attributes, operands=tuple(operands))

    def _value(self, value: Any) -> tuple[str, str]:
        found = self.values.get(id(value))
        if found is None:
            text = self.model.shapes.describe(value)
            if text not in self.texts:
                self.texts[text] = re.sub(r"[^\W\d]\w*", self._renamed, text)
            found = self.values[id(value)] = (text, self.texts[text])
        return found

    def _renamed(self, match: re.Match[str]) -> str:
        word = match[0]
        # A size that is known only once an operator has run has another number in every capture.
        return self.keys.get(word, "u" if re.fullmatch(r"u\d+", word) else word)


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    if isinstance(node.target, torch._ops.OpOverload):
        yield from arguments(node).items()
        return
    yield from ((str(position), argument) for position, argument in enumerate(node.args))
    yield from node.kwargs.items()


def _default_scale(node: fx.Node) -> float | None:
    """What attention multiplies its products with where nothing is given."""
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return None
    size = node.args[0].meta["val"].shape[-1] if isinstance(node.args[0], fx.Node) else None
    return 1 / math.sqrt(size) if isinstance(size, int) and size else None


def _split(
    slot: str, argument: Any, numbers: dict[fx.Node, int], attributes: dict[str, Any], operands: list[Operand]
) -> None:
    """An argument as operands, for the nodes in it, and as an attribute, if it holds anything else."""
    if isinstance(argument, fx.Node):
        operands.append((slot, numbers[argument]))
    elif isinstance(argument, list | tuple) and any(isinstance(part, fx.Node) for part in argument):
        for position, part in enumerate(argument):
            if isinstance(part, fx.Node):
                operands.append((f"{slot}[{position}]", numbers[part]))
        if not all(isinstance(part, fx.Node) for part in argument):
            attributes[slot] = literal(argument)
    else:
        attributes[slot] = literal(argument)


def literal(value: Any) -> Any:
    """An argument as a value that can be compared and hashed; numbers stay numbers."""
    if isinstance(value, list | tuple):
        return tuple(literal(part) for part in value)
    if isinstance(value, fx.Node):
        return _HOLE
    if isinstance(value, slice):
        return ("slice", literal(value.start), literal(value.stop), literal(value.step))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


def _size_arguments(node: fx.Node) -> frozenset[str]:
    info = lookup(node.target) if node.target is not operator.getitem else None
    if info is None or info.literals is None:
        return frozenset()
    return frozenset(one.argument for one in info.literals(node))


def family(name: str) -> str:
    """What an operator is a form of, so that `linear` may be matched with `matmul`; itself if it stands alone."""
    return _FAMILY_OF.get(name, name)
