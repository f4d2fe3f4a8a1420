"""Normalisation, as torch's whole operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.registry import Outputs, operator
from graphopt.frontends.onnx.values import refuse


@operator("BatchNormalization", until=8)
def batch_norm_spatial(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Tensor:
    if spatial != 1:
        raise refuse("attribute 'spatial'=0: statistics per activation")
    return batch_norm_inference(x, scale, bias, mean, var, epsilon=epsilon, momentum=momentum)


@operator("BatchNormalization", since=9, until=13)
def batch_norm_inference(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
) -> Tensor:
    """Further outputs, which ask for training mode before opset 14, are refused by the caller."""
    return F.batch_norm(x, mean, var, scale, bias, False, 1 - momentum, epsilon)


@operator("BatchNormalization", since=14)
def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Tensor, ...]:
    """In training mode the running statistics are outputs: `old * momentum + new * (1 - momentum)`, variance biased."""
    if not training_mode:
        return (F.batch_norm(x, mean, var, scale, bias, False, 1 - momentum, epsilon),)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    axes = [0, *range(2, x.ndim)]
    new_var, new_mean = torch.var_mean(x, axes, correction=0)
    return y, mean * momentum + new_mean * (1 - momentum), var * momentum + new_var * (1 - momentum)


@operator("InstanceNormalization")
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _whole(parameter: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A scale or bias in the full normalised shape, to which it broadcasts."""
    return parameter if parameter is None or tuple(parameter.shape) == shape else parameter.expand(shape)


def _check_stash(stash_type: int) -> None:
    if stash_type != 1:
        raise refuse(f"attribute 'stash_type'={stash_type}: only float32 (1) is handled")


@operator("LayerNormalization", since=17)
def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: Outputs,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[Tensor, ...]:
    """Over the axes from `axis` on; mean and inverse deviation, if wanted, in float32."""
    _check_stash(stash_type)
    axis %= x.ndim
    shape = tuple(x.shape[axis:])
    y = F.layer_norm(x, shape, _whole(scale, shape), _whole(bias, shape), epsilon)
    if outputs == 1:
        return (y,)
    var, mean = torch.var_mean(x.float(), tuple(range(axis, x.ndim)), correction=0, keepdim=True)
    return y, mean, torch.rsqrt(var + epsilon)


@operator("RMSNormalization", since=23)
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    _check_stash(stash_type)
    shape = tuple(x.shape[axis % x.ndim :])
    return F.rms_norm(x, shape, _whole(scale, shape), epsilon)


@operator("GroupNormalization", since=18, until=20)
def group_norm_per_group(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Before opset 21, scale and bias are per group."""
    each = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


@operator("GroupNormalization", since=21)
def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    _check_stash(stash_type)
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LRN")
def local_response_norm(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """torch's window agrees with the one of ONNX when its size is odd."""
    if size % 2 == 0:
        raise refuse(f"attribute 'size'={size}: an even window is not handled")
    return F.local_response_norm(x, size, alpha, beta, bias)
