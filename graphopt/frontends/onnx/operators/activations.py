"""Activation functions, as torch's whole operators where these exist."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.unsigned import widened
from graphopt.frontends.onnx.values import Operand, refuse

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
"""The defaults of ONNX, which are those of torch rounded to float32."""


@operator("Relu")
def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@operator("Sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@operator("Softplus")
def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


@operator("Softsign")
def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@operator("Celu", since=12)
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = SELU_ALPHA, gamma: float = SELU_GAMMA) -> Tensor:
    if math.isclose(alpha, SELU_ALPHA, rel_tol=1e-6) and math.isclose(gamma, SELU_GAMMA, rel_tol=1e-6):
        return F.selu(x)
    return gamma * F.elu(x, alpha)


@operator("Mish", since=18)
def mish(x: Tensor) -> Tensor:
    return F.mish(x)


@operator("HardSwish", since=14)
def hard_swish(x: Tensor) -> Tensor:
    return F.hardswish(x)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("ThresholdedRelu", since=10)
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.threshold(x, alpha, 0.0)


@operator("Gelu", since=20)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate not in ("none", "tanh"):
        raise refuse(f"attribute 'approximate'='{approximate}' is not handled")
    return F.gelu(x, approximate=approximate)


@operator("Swish", since=24)
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("SwiGLU", since=28)
def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`Swish(a) * b`."""
    return swish(a, alpha=alpha) * b


@operator("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """The slope broadcasts to the input; one slope, or one per channel, is torch's whole operator."""
    same = x.dtype is slope.dtype and x.dtype.is_floating_point
    if same and slope.numel() == 1 and slope.ndim <= x.ndim:
        return F.prelu(x, slope.reshape(1))
    if same and slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0] == x.shape[1]:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


@operator("Shrink", since=9)
def shrink(x: Tensor, *, lambd: float = 0.5, bias: float = 0.0) -> Tensor:
    zero = torch.zeros_like(x)
    if x.dtype.is_floating_point:
        return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero))
    raise refuse(f"it is handled for floating-point inputs, not for {x.dtype}")


@operator("Clip", until=10)
def clip_attributes(x: Tensor, *, min: float = -math.inf, max: float = math.inf) -> Tensor:
    largest = torch.finfo(torch.float32).max
    low = None if min <= -largest else min
    high = None if max >= largest else max
    return x.clone() if low is None and high is None else torch.clamp(x, low, high)


@operator("Clip", since=11)
def clip(x: Tensor, low: Operand | None = None, high: Operand | None = None) -> Tensor:
    """Where the bounds cross, the upper one wins."""
    if low is None and high is None:
        return x.clone()
    return widened(_clamp, x, low, high)


def _clamp(x: Tensor, low: Operand | None, high: Operand | None) -> Tensor:
    if isinstance(low, Tensor) == isinstance(high, Tensor) or low is None or high is None:
        return torch.clamp(x, low, high)  # type: ignore[arg-type]  # both are tensors or both are numbers
    return torch.clamp(torch.clamp(x, min=low), max=high)


@operator("Softmax", until=12)
def softmax_flat(x: Tensor, *, axis: int = 1) -> Tensor:
    """Before opset 13 the input is a matrix of the axes before `axis` and those from `axis` on."""
    if axis in (-1, x.ndim - 1):
        return torch.softmax(x, -1)
    return torch.softmax(x.flatten(axis), -1).reshape(x.shape)


@operator("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@operator("LogSoftmax", until=12)
def log_softmax_flat(x: Tensor, *, axis: int = 1) -> Tensor:
    if axis in (-1, x.ndim - 1):
        return torch.log_softmax(x, -1)
    return torch.log_softmax(x.flatten(axis), -1).reshape(x.shape)


@operator("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@operator("Hardmax", until=12)
def hardmax_flat(x: Tensor, *, axis: int = 1) -> Tensor:
    return hardmax(x.flatten(axis), axis=-1).reshape(x.shape)


@operator("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """One at the first largest value along the axis, zero elsewhere."""
    index = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, index, 1)
