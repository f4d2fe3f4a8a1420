"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.unsigned import widened


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return widened(torch.matmul, a, b)


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """`alpha * a @ b + beta * c`, as torch's whole linear layer where `c` is a plain bias."""
    left = a.t() if transA else a
    weight = b if transB else b.t()
    if alpha == beta == 1.0 and (c is None or (c.ndim == 1 and c.shape[0] == weight.shape[0])):
        return F.linear(left, weight, c)
    product = F.linear(left, weight)
    product = product if alpha == 1.0 else _scaled(product, alpha)
    return product if c is None else product + (c if beta == 1.0 else _scaled(c, beta))


def _scaled(x: Tensor, factor: float) -> Tensor:
    return (x * factor).to(x.dtype)


@operator("Einsum", since=12)
def einsum(*inputs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *inputs)


@operator("Det", since=11)
def determinant(x: Tensor) -> Tensor:
    value: Tensor = torch.linalg.det(x)
    return value


@operator("MatMulInteger", since=10)
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Product of the values minus their zero points, in int32; a vector of zero points is per row of a, column of b."""
    left, right = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        left = left - (a_zero.unsqueeze(-1) if a_zero.ndim == 1 and a_zero.numel() > 1 else a_zero).to(torch.int32)
    if b_zero is not None:
        right = right - b_zero.to(torch.int32)
    return torch.matmul(left, right)
