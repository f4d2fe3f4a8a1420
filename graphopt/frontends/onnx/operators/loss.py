"""Losses: x [N, C, ...], integer targets [N, ...]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.registry import Outputs, operator

_NOT_A_CLASS = -100
"""No target has this value when `ignore_index` is not given."""


@operator("NegativeLogLikelihoodLoss", since=12)
def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    ignored = _NOT_A_CLASS if ignore_index is None else ignore_index
    return F.nll_loss(x, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction)


@operator("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    outputs: Outputs,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, ...]:
    ignored = _NOT_A_CLASS if ignore_index is None else ignore_index
    loss = F.cross_entropy(scores, labels.to(torch.int64), weights, ignore_index=ignored, reduction=reduction)
    return (loss, torch.log_softmax(scores, 1)) if outputs > 1 else (loss,)
