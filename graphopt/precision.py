"""Arithmetic in whole float32, for comparisons that have to tell rounding from a wrong result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, products of float32 numbers are not shortened to TF32 or bfloat16.

    cuDNN does that with convolutions unless it is told not to, and `torch.set_float32_matmul_precision` lets cuBLAS and
    oneDNN do it with products.
    """
    backends = _backends()
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    cudnn: Any = torch.backends.cudnn  # torch's types know neither this one's parts nor the next one's
    mkldnn: Any = torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
