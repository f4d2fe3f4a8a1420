"""Layers that could become several cheaper ones: what each computes, at which sizes, and why others are left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphopt.fake import FakeTensor
from graphopt.ops import argument
from graphopt.passes._kernel import Kernel
from graphopt.passes._layers import read_layer
from graphopt.passes._linear import Step, is_layer, read_step
from graphopt.printer import module_path
from graphopt.rewriter import Node, Rewriter

__all__ = ["Whole", "factor_base", "find_layers", "read_whole"]

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.matmul.default)
_FACTOR = re.compile(r"(^|[._])factors\.\d+\.")
"""In the name of a weight that a factorisation has made."""


@dataclass(frozen=True, eq=False)
class Whole:
    """One layer that could be factorised.

    Attributes:
        node: its call.
        reads: the argument that holds activations, or the indices of an embedding.
        weight: the stored tensor, in the layout of its operator.
        bias: added at the end, [out]; or None.
        kernel: what it multiplies with, on the meta device: W [out, in / groups, *k]; of an embedding the table
            [entries, features].
        shape: of what it reads, at the sizes of the user's example.
        embedding: whether it looks rows up.
        across: whether the stored matrix is [in, out].
        alpha: what the stored matrix is multiplied with.
    """

    node: Node
    reads: str
    weight: Node
    bias: Node | None
    kernel: Kernel
    shape: tuple[int, ...]
    embedding: bool = False
    across: bool = False
    alpha: float = 1.0

    @property
    def name(self) -> str:
        """The path of its module, or the name of its call."""
        return module_path(self.node) or self.node.name

    @property
    def source(self) -> Node:
        """What it reads now: an edit before it may have changed that."""
        source: Node = argument(self.node, self.reads)
        return source

    def is_in(self, names: Iterable[str]) -> bool:
        """Whether one of the names is its own, or that of a module that it is in."""
        return any(self.name == name or self.name.startswith(f"{name}.") for name in names)

    def onto(self, rw: Rewriter) -> Whole:
        """The same layer in a copy of the model."""
        named = {node.name: node for node in rw.graph.nodes}
        bias = None if self.bias is None else named[self.bias.name]
        return replace(self, node=named[self.node.name], weight=named[self.weight.name], bias=bias)

    @property
    def groups(self) -> int:
        return self.kernel.groups

    @cached_property
    def columns(self) -> int:
        """Numbers that one output reads: in / groups * taps."""
        return self.kernel.weight[0].numel()

    def dense(self, rw: Rewriter) -> Tensor:
        """The weight, laid out as `kernel.weight`."""
        stored = rw.tensor(self.weight)
        assert stored is not None
        plain = stored.detach().T if self.across else stored.detach()
        return plain if self.alpha == 1 else plain.double() * self.alpha

    def stored(self, dense: Tensor) -> Tensor:
        """A dense weight in the layout of the stored one: the inverse of `dense`."""
        plain = dense if self.alpha == 1 else dense / self.alpha
        return (plain.T if self.across else plain).contiguous()


def factor_base(weight: str) -> str:
    """Where factors go: those of `conv.weight` to `conv.factors`, those of a bare `table` to `table_factors`."""
    path, _, leaf = weight.rpartition(".")
    own = "factors" if leaf == "weight" else f"{leaf}_factors"
    return f"{path}.{own}" if path else own


def find_layers(rw: Rewriter, *, factors: bool = False) -> Iterator[tuple[Node, Whole | str]]:
    """Every call of a layer in order, as one that could be factorised or with the reason why not; with `factors` those
    as well that are parts of a factorisation already."""
    for node in list(rw.find()):
        if not isinstance(rw.value(node), FakeTensor):
            continue
        found = read_whole(rw, node)
        if isinstance(found, Whole):
            found = _why_fixed(rw, found) or (None if factors else _why_factor(rw, found)) or found
        if found is not None:
            yield node, found


def read_whole(rw: Rewriter, node: Node) -> Whole | str | None:
    """The layer that a call is, why it cannot be read, or None for a call of anything else."""
    if node.target is aten.embedding.default:
        return _embedding(rw, node)
    if is_layer(node):
        axes = 0 if node.target is aten.linear.default else rw.fake(argument(node, "weight")).dim() - 2
        step = read_step(rw, node, axes, numbers=False)
        return _of_step(rw, step) if isinstance(step, Step) else step
    if node.target in _PRODUCTS and any(used.op == "get_attr" for used in node.all_input_nodes):
        return _matrix(rw, node)
    return None


def _of_step(rw: Rewriter, step: Step) -> Whole:
    layer = step.layer
    assert layer is not None
    across = not step.kernel.axes and layer.weight_out == 1
    kernel = replace(step.kernel, bias=None).meta()
    return Whole(step.node, layer.input_name, layer.weight, layer.bias, kernel, _sizes(rw, step.source), across=across)


def _matrix(rw: Rewriter, node: Node) -> Whole | str:
    """A product with a stored matrix, which is what some frameworks write for a linear layer."""
    layer = read_layer(rw, node)
    if isinstance(layer, str):
        return layer
    if layer.bias is not None and (layer.beta != 1 or rw.fake(layer.bias).dim() != 1):
        return f"what '{node.name}' adds is no bias"
    why = rw.why_shared(layer.weight, layer.reader)
    if why is not None:
        return why
    if rw.fake(layer.input).dtype != rw.fake(layer.weight).dtype:
        return f"'{node.name}' mixes dtypes"
    shape = rw.fake(layer.weight).shape
    across = layer.weight_out == 1
    kernel = Kernel.of(torch.empty(*(shape[::-1] if across else shape), device="meta"))
    sizes = _sizes(rw, layer.input)
    return Whole(node, layer.input_name, layer.weight, layer.bias, kernel, sizes, across=across, alpha=layer.alpha)


def _embedding(rw: Rewriter, node: Node) -> Whole | str:
    weight, indices = argument(node, "weight"), argument(node, "indices")
    if rw.tensor(weight) is None:
        return f"the table of '{node.name}' is computed"
    why = rw.why_shared(weight, node)
    if why is not None:
        return f"{why}: a tied table would have to be factorised on both sides"
    if argument(node, "sparse") or argument(node, "scale_grad_by_freq"):
        return f"'{node.name}' has gradients of its own kind"
    kernel = Kernel.of(torch.empty(*rw.fake(weight).shape, device="meta"))
    return Whole(node, "indices", weight, None, kernel, _sizes(rw, indices), embedding=True)


def _sizes(rw: Rewriter, node: Node) -> tuple[int, ...]:
    return tuple(rw.model.shapes.number(size) for size in rw.fake(node).shape)


def _why_fixed(rw: Rewriter, whole: Whole) -> str | None:
    name = str(whole.weight.target)
    if name in rw.params.masks:
        return f"the mask of '{name}' keeps elements zero"
    if rw.params[name].device.type == "meta":
        return f"'{name}' has no data"
    if not whole.kernel.weight.numel():
        return f"'{name}' has no elements"
    return None


def _why_factor(rw: Rewriter, whole: Whole) -> str | None:
    """Why a layer counts as a part of a factorisation that is there already."""
    name = str(whole.weight.target)
    if _FACTOR.search(name):
        return f"'{name}' is a factor already"
    before = _neighbour(rw, whole.source, whole) if list(whole.source.users) == [whole.node] else None
    if before is not None and _is_narrow(before, whole):
        return f"'{before.node.name}' and it are factors of one layer already"
    users = list(whole.node.users)
    after = _neighbour(rw, users[0], whole) if len(users) == 1 else None
    if after is not None and after.source is whole.node and _is_narrow(whole, after):
        return f"it and '{after.node.name}' are factors of one layer already"
    return None


def _neighbour(rw: Rewriter, node: Any, whole: Whole) -> Whole | None:
    """The dense layer of the same kind that `node` is."""
    if node.op != "call_function" or whole.embedding or not isinstance(rw.value(node), FakeTensor):
        return None
    found = read_whole(rw, node)
    same = isinstance(found, Whole) and not found.embedding and found.kernel.axes == whole.kernel.axes
    return found if same and isinstance(found, Whole) and found.groups == whole.groups == 1 else None


def _is_narrow(first: Whole, second: Whole) -> bool:
    """Whether two layers after each other have fewer weights than the one layer that they are together."""
    reach = [a + b - 1 for a, b in zip(first.kernel.size, second.kernel.size, strict=True)]
    one = first.kernel.inputs * second.kernel.outputs * math.prod(reach)
    return first.kernel.macs + second.kernel.macs < one
