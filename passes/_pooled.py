"""Pointwise layers around the average of a whole image: they may as well come after it."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.fake import FakeTensor
from graphopt.ops import argument
from graphopt.passes._kernel import Kernel, regroup
from graphopt.passes._linear import Step, read_step
from graphopt.passes._merged_layer import Price, common_path, emit, why_apart, why_not_finite
from graphopt.passes._merging import compose
from graphopt.passes._rounds import Note
from graphopt.rewriter import Node, Rewriter

__all__ = ["average_first", "into_linear", "is_global_average"]

aten = torch.ops.aten

_ADAPTIVE = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
_RESHAPES = (
    aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims, aten.squeeze.default,
    aten._unsafe_view.default,
)  # fmt: skip


def average_first(rw: Rewriter, node: Node, price: Price, note: Note) -> bool:
    """Let a pointwise convolution whose output is only averaged, by the call `node`, work on the average instead:
    mean(W x + b) = W mean(x) + b, of H * W times fewer products. Says whether it was done."""
    axes = rw.fake(argument(node, "self")).dim() - 2
    conv = argument(node, "self")
    step = read_step(rw, conv, axes)
    if not isinstance(step, Step) or step.layer is None:
        if isinstance(step, str):
            note(node, f"what it averages stays before it: {step}")
        return False
    others = [user.name for user in conv.users if user is not node]
    if others or not step.kernel.is_pointwise:
        what = f"is also used by '{others[0]}'" if others else "reads more than one position"
        note(node, f"what it averages stays before it: '{conv.name}' {what}")
        return False
    how = {name: value for name, value in node.kwargs.items() if name != "self"}
    pooled = rw.call(node.target, step.source, *node.args[1:], before=node, like=node, **how)
    kernel = _matrix(step.kernel) if rw.fake(node).dim() == 2 else step.kernel
    cost = price.of_call(pooled) + price.of_kernel(rw, kernel, pooled, node)
    apart = price.of_call(node) + price.of_steps(rw, [step])
    if cost > apart:
        rw.discard(pooled)
        note(node, f"averaging first {price.takes(cost, apart)}")
        return False
    if rw.fake(node).dim() == 2:
        made = emit(rw, kernel, pooled, [step], common_path([step], "merged"), before=node)
    else:
        how = {name: value for name, value in conv.kwargs.items() if name != "input"}
        made = rw.call(conv.target, pooled, *conv.args[1:], before=node, like=conv, **how)
    rw.replace(node, made, f"'{conv.name}' works on the average")
    return True


def _matrix(kernel: Kernel) -> Kernel:
    """A pointwise kernel as a linear layer."""
    whole = regroup(kernel, 1)
    return Kernel.of(whole.weight.flatten(1), whole.bias)


def is_global_average(rw: Rewriter, node: Node) -> bool:
    """Whether a call takes the mean of all positions of an image, channel by channel."""
    if node.op != "call_function" or not isinstance(rw.value(node), FakeTensor):
        return False
    if node.target in _ADAPTIVE:
        sizes = argument(node, "output_size")
        return rw.fake(node).dim() == len(sizes) + 2 and all(size == 1 for size in sizes)
    if node.target is not aten.mean.dim or argument(node, "dtype") is not None or argument(node, "dim") is None:
        return False
    rank = rw.fake(argument(node, "self")).dim()
    return rank > 2 and sorted(axis % rank for axis in argument(node, "dim")) == list(range(2, rank))


def into_linear(rw: Rewriter, node: Node, price: Price, note: Note) -> bool:
    """Merge a pointwise convolution of an image of one position, which is then flattened, into the linear layer `node`
    that reads it; says whether it was."""
    last, flat = read_step(rw, node, 0), argument(node, "input")
    conv = _flattened(rw, flat)
    if conv is None or not isinstance(last, Step):
        return False
    step = read_step(rw, conv, rw.fake(conv).dim() - 2)
    if not isinstance(step, Step) or step.layer is None or not step.kernel.is_pointwise:
        return False
    steps = [step, last]
    shared = [name for value, user in ((flat, node), (conv, flat)) for name in _others(value, user)]
    why = f"its output is also used by '{shared[0]}'" if shared else why_apart(rw, steps)
    kernel = compose(_matrix(step.kernel), last.kernel)
    why = why or why_not_finite(kernel, rw.fake(node).dtype)
    if why is not None:
        note(node, f"'{conv.name}' is not merged into it: {why}")
        return False
    source = rw.call(aten.flatten.using_ints, step.source, 1, before=node, like=flat)
    cost, apart = price.of_kernel(rw, kernel, source, node), price.of_steps(rw, steps)
    if cost > apart:
        rw.discard(source)
        note(node, f"merging it with '{conv.name}' {price.takes(cost, apart)}")
        return False
    made = emit(rw, kernel, source, steps, common_path(steps, "merged"), before=node)
    rw.replace(node, made, f"merged: {conv.name}, {node.name}")
    return True


def _others(value: Node, user: Node) -> list[str]:
    return [other.name for other in value.users if other is not user]


def _flattened(rw: Rewriter, node: Any) -> Node | None:
    """The image [batch, channels, 1, ...] that `node` [batch, channels] is."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in _RESHAPES:
        return None
    image = argument(node, "self")
    flat, shape = rw.fake(node).shape, rw.fake(image).shape
    ones = all(isinstance(size, int) and size == 1 for size in shape[2:]) and len(shape) > 2
    return image if ones and len(flat) == 2 and isinstance(flat[1], int) and flat[1] == shape[1] else None
