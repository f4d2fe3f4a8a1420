"""Folding of batch normalisation into the layers around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.ops import argument
from graphopt.passes._affine import Affine, absorb
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["FoldBatchNorm", "read_batch_norm"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalisation into the convolution or linear layer next to it.

    What:
        A batch norm in evaluation mode is one scale and one shift per channel, which the weight and bias of the layer
        before it can hold; where that layer cannot, the layers after it. The batch norm is gone afterwards.

    Algebra:
        s = gamma / sqrt(var + eps), t = beta - mean * s, all [C].
        After a layer:    W [out, in/groups, *kernel]: W[o] *= s[o], b = s * b + t.
        After a transposed convolution: W [in, out/groups, *kernel] as [groups, in/groups, out/groups, *kernel] times s
        as [groups, 1, out/groups, ...].
        Before a layer:   W[:, i] *= s[i], b += sum over i and taps of W[:, i] * t[i]; with zero padding only if
        t = 0, or if -t/s is the same for every channel: then x is padded with that constant.

    When it applies:
        conv1d/2d/3d, transposed ones, grouped ones, linear, addmm, and mm or matmul that need no shift; transpositions
        between the layer and the norm do not matter. Left alone, each with its reason: a norm that trains or keeps no
        statistics; a layer whose output has other users, whose weight or bias is shared or tied (folding would untie
        it) or computed; a norm over another axis than the layer's channels; mixed dtypes; values that would overflow;
        masks that would be broken; a norm between two operators of which neither is such a layer.

    Safety:
        Exact: only the order of multiplications and sums changes. Computed in float64, stored in the weight's dtype.
        Afterwards the model can no longer update statistics: switched to train mode it behaves as with frozen norms.

    Cost:
        One pass over every folded weight.

    Source:
        Jacob et al., Quantization and Training of Neural Networks, arXiv:1712.05877, section 3.2.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> model = graphopt.capture(net, (torch.randn(1, 3, 8, 8),))
        >>> folded, reports = graphopt.run(model, "fold-batch-norm")
        >>> [node.name for node in folded.graph.nodes if node.op == "call_function"]
        ['conv2d']
    """

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        absorb(rw, rw.find(aten.batch_norm.default), read_batch_norm)


def read_batch_norm(rw: Rewriter, node: Node) -> Affine | str:
    """The batch norm as an affine map on axis 1, or why it is none."""
    if argument(node, "training"):
        return "it trains, so its statistics are those of the batch"
    named = {name: argument(node, name) for name in ("weight", "bias", "running_mean", "running_var")}
    if named["running_mean"] is None or named["running_var"] is None:
        return "it keeps no running statistics"
    tensors = {name: rw.tensor(value) for name, value in named.items()}
    for name, value in named.items():
        if value is not None and tensors[name] is None:
            return f"its {name} is computed"
    given = [tensor for tensor in tensors.values() if tensor is not None]
    dtype = rw.fake(node).dtype
    if any(tensor.dtype != dtype for tensor in given):
        return f"it computes in {dtype} with parameters of another dtype"
    if any(tensor.device.type == "meta" for tensor in given):
        return "its parameters have no data"
    mean, var, gamma, beta = (tensors[name] for name in ("running_mean", "running_var", "weight", "bias"))
    assert mean is not None and var is not None
    scale = torch.rsqrt(var.double() + argument(node, "eps"))
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    if beta is not None:
        shift = shift + beta.double()
    trainable = any(rw.params[str(value.target)].requires_grad for value in named.values() if value is not None)
    return Affine(node, argument(node, "input"), 1, scale, shift, trainable)
