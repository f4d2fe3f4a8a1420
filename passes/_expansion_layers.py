"""A block once more, behind itself, with an end of zeros: x + f(x) with f = 0."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.analysis.branches import Branch
from graphopt.ops import Contracted, Moved, Normalized, Product, argument, lookup, operands
from graphopt.params import ParamKind
from graphopt.passes._blocks import Block
from graphopt.passes._expansion import Draw
from graphopt.passes._expansion_rules import SUMS, ZERO_AT_ZERO
from graphopt.printer import module_path
from graphopt.rewriter import Node, Rewriter

__all__ = ["add_behind", "why_not"]

aten = torch.ops.aten

_CASTS = ("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout")


def why_not(rw: Rewriter, block: Block) -> str | None:
    """Why a copy of a block with zeros at its end would not be the identity; None if it would be."""
    source: Node | None = None
    for branch in block.branches:
        kept = rw.argument(branch.add, "self" if branch.operand else "other")
        if kept is not branch.entry:
            return f"'{branch.name}' is not added to the value that it starts from"
        if source is not None and _before_casts(branch.entry) is not source:
            return f"something stands between its branches: '{branch.entry.name}'"
        if _end(rw, branch) is None:
            return f"'{branch.name}' does not end with a layer, or a norm, whose weights could be zero"
        source = branch.add
    return None


def _before_casts(node: Node) -> Node:
    """The value that is cast to the dtype which it has, as RMS norms do with float32."""
    while str(node.target) in _CASTS and node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype:
        node = node.all_input_nodes[0]
    return node


def _end(rw: Rewriter, branch: Branch) -> tuple[Node, ...] | None:
    """The stored tensors of the last layer of a branch: zeros in all of them make it zero. None if there is none."""
    node, added = rw.argument(branch.add, "other" if branch.operand else "self"), list[Node]()
    while node in branch.nodes and node.op == "call_function":
        info = lookup(node.target)
        axes, name = (info.axes if info is not None else None), str(node.target).split(".")[1]
        tensors = [used for used in node.all_input_nodes if isinstance(rw.value(used), torch.Tensor)]
        stored = [tensor for tensor in map(_stored, tensors) if tensor is not None]
        if isinstance(axes, Contracted | Product | Normalized):
            factors = operands(node) if isinstance(axes, Product) else [argument(node, "weight")]
            layer = any(isinstance(one, Node) and _stored(one) is not None for one in factors)
            return (*stored, *added) if layer and len(tensors) - len(stored) <= 1 else None
        if str(node.target) in SUMS and len(tensors) == 2 and stored:
            added += stored
        elif not (isinstance(axes, Moved) and len(tensors) == 1 and "pad" not in name) and name not in ZERO_AT_ZERO:
            return None
        node = next(used for used in tensors if _stored(used) is None)
    return None


def _stored(node: Node) -> Node | None:
    """The stored tensor that a node is, or transposes."""
    while node.op == "call_function" and str(node.target) in ("aten.t.default", "aten.transpose.int"):
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


def add_behind(rw: Rewriter, block: Block, count: int, draw: Draw) -> list[str]:
    """Put copies of a block behind it that add zeros, with weights of their own; returns the names of their modules."""
    end, names = block.branches[-1].add, []
    last = rw.call(end.target, *end.args, before=end.next, like=end, **end.kwargs)
    for _ in range(count):
        copier = _Copier(rw, block, last, draw)
        last = copier.run()
        names.append(copier.name)
    rw.replace(end, last, f"{count} of '{names[0]}' behind '{block.name}'")
    rw.model.touch()
    return names


class _Copier:
    """Copies calls of a block in front of the call that comes behind it."""

    def __init__(self, rw: Rewriter, block: Block, source: Node, draw: Draw) -> None:
        self.rw, self.block, self.draw, self.before = rw, block, draw, source.next
        self.old, self.name = block.name.partition("#")[0], _free_name(rw, block)
        self.zeros = {id(self._tensor(one)) for branch in block.branches for one in _end(rw, branch) or ()}
        self.source, self.twins = source, dict[Node, Node]()
        self._made: dict[int, Node] = {}

    def run(self) -> Node:
        value = self.source
        for branch in self.block.branches:
            self.twins[branch.entry] = value
            for node in (*(one for one in branch.nodes if one.op == "call_function"), branch.add):
                self.twins[node] = self.call(node)
            value = self.twins[branch.add]
        return value

    def call(self, node: Node) -> Node:
        args, kwargs = pytree.tree_map(self._twin, (tuple(node.args), dict(node.kwargs)))
        op = aten.reshape.default if node.target is aten.view.default else node.target
        made = self.rw.call(op, *args, before=self.before, like=node, **kwargs)
        made.meta["path"] = self._renamed(module_path(node))
        return made

    def _twin(self, value: Any) -> Any:
        if not isinstance(value, Node) or value in self.twins:
            return self.twins[value] if isinstance(value, Node) else value
        if value.op != "get_attr" or self.rw.params.kind(str(value.target)) is ParamKind.CONSTANT:
            return value
        key = id(self._tensor(value))
        if key not in self._made:
            self._made[key] = self._stored(value)
        return self._made[key]

    def _stored(self, node: Node) -> Node:
        """A tensor of the copy: zero at the end of a branch, drawn for weights, copied for vectors and buffers."""
        name, tensor = str(node.target), self._tensor(node)
        kind, values = self.rw.params.kind(name), tensor.detach().clone()
        if id(tensor) in self.zeros:
            values.zero_()
        elif kind is ParamKind.PARAMETER and values.dim() > 1:
            values = self.draw.like(values, values)
        mask = self.rw.params.masks.get(name)
        if mask is not None:
            values[mask] = 0
        made = self.rw.add_tensor(self._renamed(name), values, kind=kind, like=node)
        made.meta["path"] = self._renamed(module_path(node))
        self._tensor(made).requires_grad_(tensor.requires_grad)
        if mask is not None:
            self.rw.params.masks[str(made.target)] = mask
        if name in self.rw.params.precision:
            self.rw.params.precision[str(made.target)] = self.rw.params.precision[name]
        return made

    def _tensor(self, node: Node) -> torch.Tensor:
        return self.rw.params[str(node.target)]

    def _renamed(self, path: str) -> str:
        if path == self.old or path.startswith(f"{self.old}."):
            return self.name + path[len(self.old) :]
        return f"{self.name}.{path}" if path else self.name


def _free_name(rw: Rewriter, block: Block) -> str:
    """The name of a module that holds nothing yet: the next number where the block's name ends with one."""
    base = block.name.partition("#")[0]
    head, _, last = base.rpartition(".")
    number = int(last) + 1 if last.isdigit() else 0
    while True:
        name = f"{head}.{number}".lstrip(".") if last.isdigit() else f"{base}_added{number or ''}"
        if not any(one == name or one.startswith(f"{name}.") for one in rw.params):
            return name
        number += 1
