"""Where the calls of factors are written: into a model, or into a graph of their own to see what they would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.node import map_arg

from graphopt.ops import lookup
from graphopt.params import ParamKind
from graphopt.passes._factor_layers import Whole, factor_base
from graphopt.passes._kernel import Kernel
from graphopt.rewriter import Node, Rewriter

__all__ = ["Aside", "Inside", "Writer", "write_kernel"]

aten = torch.ops.aten

_CONVOLVE = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


class Writer(Protocol):
    """Makes nodes for one layer. `source` is what the layer reads, `bias` its bias or None."""

    source: Node
    bias: Node | None

    def call(self, op: Any, *args: Any) -> Node:
        """A call of an operator."""

    def tensor(self, leaf: str, value: Tensor) -> Node:
        """A stored tensor."""

    def places(self, leaf: str, value: Tensor) -> Node:
        """A stored tensor of integers, which nothing trains."""


class Inside:
    """Writes in front of a layer of a model, with tensors of the dtype, kind and precision of the layer's weight.

    Attributes:
        calls, tensors: what was written, in order.
    """

    def __init__(self, rw: Rewriter, whole: Whole) -> None:
        self.rw, self.whole = rw, whole
        self.source, self.bias = whole.source, whole.bias
        self.name = str(whole.weight.target)
        self.like = rw.params[self.name]
        self.calls: list[Node] = []
        self.tensors: list[Node] = []

    def call(self, op: Any, *args: Any) -> Node:
        made = self.rw.call(op, *args, before=self.whole.node, like=self.whole.node)
        self.calls.append(made)
        return made

    def tensor(self, leaf: str, value: Tensor) -> Node:
        kind, precision = self.rw.params.kind(self.name), self.rw.params.precision.get(self.name)
        stored = value.to(self.like.dtype).to(self.like.device).contiguous()
        if kind is ParamKind.PARAMETER:
            stored = torch.nn.Parameter(stored, requires_grad=self.like.requires_grad)
        made = self.rw.add_tensor(f"{factor_base(self.name)}.{leaf}", stored, kind=kind, like=self.whole.node)
        if precision is not None:
            self.rw.params.precision[str(made.target)] = precision
        self.tensors.append(made)
        return made

    def places(self, leaf: str, value: Tensor) -> Node:
        stored = value.to(self.like.device)
        name = f"{factor_base(self.name)}.{leaf}"
        made = self.rw.add_tensor(name, stored, kind=ParamKind.BUFFER, like=self.whole.node)
        self.tensors.append(made)
        return made


class Aside:
    """Writes into a graph of its own, of tensors without data, at the sizes of the user's example.

    Attributes:
        calls: what was written, in order.
        parameters: elements of the stored tensors.
    """

    def __init__(self, rw: Rewriter, whole: Whole) -> None:
        self.graph = type(rw.graph)()
        self.calls: list[Node] = []
        self.parameters = 0
        self._dtype = rw.fake(whole.weight).dtype
        dtype = rw.fake(whole.source).dtype
        self.source = self._made(self.graph.placeholder("x"), torch.empty(whole.shape, dtype=dtype, device="meta"))
        self.bias: Node | None = None
        if whole.bias is not None:
            value = torch.empty(rw.fake(whole.bias).shape, dtype=self._dtype, device="meta")
            self.bias = self._made(self.graph.create_node("get_attr", "bias"), value)

    def call(self, op: Any, *args: Any) -> Node:
        values = map_arg(args, lambda node: node.meta["val"])
        node = self._made(self.graph.call_function(op, args), op(*values))
        self.calls.append(node)
        return node

    def tensor(self, leaf: str, value: Tensor) -> Node:
        self.parameters += value.numel()
        return self._made(self.graph.create_node("get_attr", leaf), value.to("meta", self._dtype))

    def places(self, leaf: str, value: Tensor) -> Node:
        return self._made(self.graph.create_node("get_attr", leaf), value.to("meta"))

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the calls, each at the positions that it makes."""
        infos = [(node, lookup(node.target)) for node in self.calls]
        return float(sum(int(info.macs(node)) for node, info in infos if info is not None and info.macs is not None))

    def _made(self, node: Node, value: Tensor) -> Node:
        node.meta["val"] = value
        return node


def write_kernel(writer: Writer, source: Node, kernel: Kernel, leaf: str, bias: Node | None = None) -> Node:
    """The call of a kernel on what `source` makes; paddings that differ before and after an axis are a pad of their
    own."""
    weight = writer.tensor(f"{leaf}.weight", kernel.weight)
    if not kernel.axes:
        return writer.call(_CONVOLVE[0], source, weight, bias)
    even = all(a == b for a, b in kernel.padding)
    if not even:
        pads = [size for pair in reversed(kernel.padding) for size in pair]
        source = writer.call(aten.constant_pad_nd.default, source, pads)
    padding: Sequence[int] = [before if even else 0 for before, _ in kernel.padding]
    numbers = (list(kernel.stride), padding, list(kernel.dilation), kernel.groups)
    return writer.call(_CONVOLVE[kernel.axes], source, weight, bias, *numbers)
