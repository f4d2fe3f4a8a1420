"""A batch norm behind a merged convolution, which changes nothing in evaluation mode and keeps training stable.

Layers that had batch norms become one that has none, and a deep net without any diverges at the learning rates that it
was trained with. So with m and v the mean and variance of W x over calibration data, the bias b of the layer moves into
a norm: sqrt(v + eps) (W x - m) / sqrt(v + eps) + (m + b) = W x + b. `fold-batch-norm` takes it away again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphopt.params import ParamKind
from graphopt.passes._kernel import Kernel
from graphopt.passes._regression import convolve
from graphopt.rewriter import Node, Rewriter

__all__ = ["norm_to_keep", "normed"]

aten = torch.ops.aten


def norm_to_keep(nodes: Sequence[Node]) -> Node | None:
    """The last batch norm among the calls that become one layer; None where a batch norm follows that layer anyway."""
    if any(user.target is aten.batch_norm.default for user in nodes[-1].users):
        return None
    return next((node for node in reversed(nodes) if node.target is aten.batch_norm.default), None)


def normed(rw: Rewriter, made: Node, kernel: Kernel, xs: Sequence[Tensor], like: Node, before: Node) -> Node:
    """A batch norm of `made`, which is `kernel` without its bias, in front of `before`.

    Args:
        xs: what the kernel gets on calibration data, [n, in, *sizes] each.
        like: the batch norm whose eps and momentum it has.
    """
    mean, variance = _moments([convolve(replace(kernel, bias=None), x) for x in xs])
    weight = str(made.args[1].target)  # type: ignore[union-attr]  # a layer's second argument is its weight
    kind, trainable = rw.params.kind(weight), rw.params[weight].requires_grad
    path, dtype = weight.rpartition(".")[0] + "_norm", rw.fake(made).dtype

    def trained(name: str, value: Tensor) -> Node:
        stored = value.to(dtype)
        parameter = nn.Parameter(stored, requires_grad=trainable) if kind is ParamKind.PARAMETER else stored
        return rw.add_tensor(f"{path}.{name}", parameter, kind=kind, like=made)

    def running(name: str, value: Tensor) -> Node:
        return rw.add_tensor(f"{path}.running_{name}", value.to(dtype), kind=ParamKind.BUFFER, like=made)

    scale = (variance + float(rw.argument(like, "eps"))).sqrt()
    tensors = [
        trained("weight", scale),
        trained("bias", mean if kernel.bias is None else mean + kernel.bias.to(mean)),
        running("mean", mean),
        running("var", variance),
    ]
    rest = [rw.argument(like, name) for name in ("training", "momentum", "eps", "cudnn_enabled")]
    return rw.call(aten.batch_norm.default, made, *tensors, *rest, before=before, like=made)


def _moments(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel of values [n, channels, *sizes], in float64."""
    rows = torch.cat([value.double().transpose(0, 1).flatten(1) for value in values], 1)
    return rows.mean(1), rows.var(1, correction=0)
