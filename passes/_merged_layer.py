"""Writing a kernel into the graph as a layer of its own, and what it costs beside the layers that it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphopt.measure import LatencyTable, Stopwatch
from graphopt.model import Model
from graphopt.params import ParamKind
from graphopt.passes._kernel import Kernel
from graphopt.passes._linear import Step
from graphopt.passes._rounds import DEARER
from graphopt.rewriter import Node, Rewriter
from graphopt.target import Target

__all__ = ["Price", "common_path", "emit", "traits_of", "why_apart", "why_not_finite"]

aten = torch.ops.aten

_CONVOLVE = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
Traits = Mapping[str, Any]


def traits_of(rw: Rewriter, step: Step) -> dict[str, Any]:
    """What the weight of a layer has besides its numbers."""
    assert step.layer is not None
    name = str(step.layer.weight.target)
    return {
        "dtype": rw.params[name].dtype,
        "kind": rw.params.kind(name),
        "precision": rw.params.precision.get(name),
        "requires_grad": rw.params[name].requires_grad,
    }


def why_apart(rw: Rewriter, steps: Sequence[Step], names: Sequence[str] = ("dtype", "kind", "precision")) -> str | None:
    """Why the weights of some layers may not become one: they differ in one of the traits called `names`."""
    layers = [step for step in steps if step.layer is not None]
    first = traits_of(rw, layers[0])
    for step in layers[1:]:
        traits = traits_of(rw, step)
        for name in names:
            if traits[name] != first[name]:
                ours, theirs = (_text(value) for value in (traits[name], first[name]))
                return f"the {name} of the weight of '{step.node.name}' is {ours}, not {theirs}"
    return None


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, ParamKind) else value)


def why_not_finite(kernel: Kernel, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot be stored in `dtype`."""
    for tensor in (kernel.weight, kernel.bias):
        if tensor is not None and not bool(torch.isfinite(tensor.to(dtype)).all()):
            return f"the merged weights would not be finite in {dtype}"
    return None


def emit(rw: Rewriter, kernel: Kernel, source: Node, steps: Sequence[Step], path: str, *, before: Node) -> Node:
    """A call that does what the kernel does, in front of `before`, with tensors called after `path`.

    They are of the dtype, kind and precision of the layers among `steps`, and trainable where a tensor of a step was.
    Paddings that differ before and after an axis are a pad of their own.
    """
    layers = [step for step in steps if step.layer is not None]
    traits, like = traits_of(rw, layers[0]), layers[0].node
    trainable = any(step.trainable for step in steps)

    def tensor(name: str, value: torch.Tensor) -> Node:
        stored = value.to(traits["dtype"]).contiguous()
        if traits["kind"] is ParamKind.PARAMETER:
            stored = torch.nn.Parameter(stored, requires_grad=trainable)
        return rw.add_tensor(name, stored, kind=traits["kind"], like=like)

    path = _free(rw, path)
    weight = tensor(f"{path}.weight", kernel.weight)
    if traits["precision"] is not None:
        rw.params.precision[str(weight.target)] = traits["precision"]
    bias = None if kernel.bias is None else tensor(f"{path}.bias", kernel.bias)
    if not kernel.axes:
        return rw.call(aten.linear.default, source, weight, bias, before=before, like=like)
    if any(a != b for a, b in kernel.padding):
        source = rw.call(aten.constant_pad_nd.default, source, _pads(kernel), before=before, like=like)
    return rw.call(_CONVOLVE[kernel.axes], source, weight, bias, *_numbers(kernel), before=before, like=like)


def _free(rw: Rewriter, path: str) -> str:
    """A module path that nothing is at: `path`, or `path_1`, `path_2`, ..."""
    *parents, leaf = path.split(".")
    owner: Any = rw.model.module
    for part in parents:
        owner = getattr(owner, part, None)
    name, count = leaf, 0
    while hasattr(owner, name):
        count += 1
        name = f"{leaf}_{count}"
    return ".".join([*parents, name])


def _pads(kernel: Kernel) -> list[int]:
    """As a pad takes them, from the last axis backwards."""
    return [size for pair in reversed(kernel.padding) for size in pair]


def _numbers(kernel: Kernel) -> list[Any]:
    """Stride, padding, dilation and groups as a convolution takes them; its padding is none where a pad does it."""
    even = all(a == b for a, b in kernel.padding)
    padding = [before if even else 0 for before, _ in kernel.padding]
    return [list(kernel.stride), padding, list(kernel.dilation), kernel.groups]


def common_path(steps: Sequence[Step], leaf: str) -> str:
    """A module path for a merged layer: that of a single layer, else `leaf` in the module that all are in."""
    names = [str(step.layer.weight.target).split(".")[:-1] for step in steps if step.layer is not None]
    shared = 0
    while all(len(name) > shared + 1 and name[shared] == names[0][shared] for name in names):
        shared += 1
    return ".".join([*names[0][:shared], leaf])


class Price:
    """What layers cost: multiply-accumulates at the sizes of the example, or measured seconds on a target, each layer
    compiled and timed alone. Batch norms, arithmetic and pads cost nothing: they are computed with a layer."""

    def __init__(self, model: Model, target: str | None, threads: int | None) -> None:
        self.target = target
        watch = None if target is None else Stopwatch(Target.parse(target), threads)
        self.table = None if watch is None else LatencyTable(watch, model.shapes)

    def of_steps(self, rw: Rewriter, steps: Sequence[Step]) -> float:
        return sum(self._of_step(rw, step) for step in steps if not step.is_free)

    def _of_step(self, rw: Rewriter, step: Step) -> float:
        if self.table is not None:
            return self.table.seconds(step.node)
        return float(step.kernel.macs * _positions(rw, step.node, step.kernel.axes))

    def of_kernel(self, rw: Rewriter, kernel: Kernel, source: Node, output: Node) -> float:
        """A kernel that reads `source` and would make a value with the positions of `output`."""
        if self.table is None:
            return float(kernel.macs * _positions(rw, output, kernel.axes))
        return self.table.seconds(_call_by_itself(rw, kernel, source))

    def of_call(self, node: Node) -> float:
        """A call that computes nothing, but may take time."""
        return 0.0 if self.table is None else self.table.seconds(node)

    def of_split(self, rw: Rewriter, node: Node, sizes: Sequence[int]) -> float:
        """Splitting the channels of a value like that of `node`, had it as many."""
        if self.table is None:
            return 0.0
        graph = type(rw.graph)()
        whole = graph.placeholder("x")
        shape = [*_sizes(rw, node)[:1], sum(sizes), *_sizes(rw, node)[2:]]
        whole.meta["val"] = torch.empty(shape, dtype=rw.fake(node).dtype, device="meta")
        return self.table.seconds(graph.call_function(aten.split_with_sizes.default, (whole, list(sizes), 1)))

    def takes(self, cost: float, apart: float) -> str:
        """Why something that is exact is left alone: what it costs, and what that would replace."""
        if self.table is None:
            return f"{DEARER} {int(cost):,} instead of {int(apart):,} multiply-accumulates"
        return f"{DEARER} {cost * 1e6:,.1f} instead of {apart * 1e6:,.1f} microseconds on {self.target}"


def _positions(rw: Rewriter, node: Node, axes: int) -> int:
    """Positions of a value, its channels counted once, at the sizes of the example."""
    sizes = _sizes(rw, node)
    return math.prod(sizes) // max(sizes[1 if axes else -1], 1)


def _sizes(rw: Rewriter, node: Node) -> list[int]:
    return [rw.model.shapes.number(size) for size in rw.fake(node).shape]


def _call_by_itself(rw: Rewriter, kernel: Kernel, source: Node) -> Node:
    """The call that `emit` would write, in a graph of its own, of tensors without data."""
    graph = type(rw.graph)()
    dtype, sizes = rw.fake(source).dtype, _sizes(rw, source)
    if kernel.axes and any(a != b for a, b in kernel.padding):
        sizes[2:] = [size + a + b for size, (a, b) in zip(sizes[2:], kernel.padding, strict=True)]

    def made(node: Node, shape: Sequence[int]) -> Node:
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    args: list[Any] = [
        made(graph.placeholder("x"), sizes),
        made(graph.create_node("get_attr", "w"), kernel.weight.shape),
    ]
    args.append(None if kernel.bias is None else made(graph.create_node("get_attr", "b"), kernel.bias.shape))
    return graph.call_function(_CONVOLVE[kernel.axes], (*args, *(_numbers(kernel) if kernel.axes else [])))
