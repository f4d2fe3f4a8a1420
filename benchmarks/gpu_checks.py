"""Small models whose answers are checked on a GPU: each kernel rule, with the sizes and layouts that go wrong first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CHECKS", "DTYPES", "Function", "args_of"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Function(nn.Module):
    """A function with parameters as a module, the input first."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(_numbers(i, shape) for i, shape in enumerate(shapes))

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args, *self.weights)


def _numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 1/8 between -1 and 1: every dtype holds them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator) / 8


def args_of(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_numbers(100 + i, shape).to(dtype) for i, shape in enumerate(shapes))


def _conv(**options: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: F.conv2d(x, w, b, **options)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _self_attention(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    q, k, v = (_heads(part, 4) for part in F.linear(x, w, b).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


def _masked(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, y, y, attn_mask=mask > 0)


def _residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.conv2d(F.relu(F.conv2d(x, w, b, padding=1)), w, b, padding=1) + x)


CHECKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "conv-stem": (lambda: Function(_conv(stride=2, padding=3), (24, 3, 7, 7), (24,)), ((2, 3, 29, 31),)),
    "conv-3x3": (lambda: Function(_conv(padding=1), (40, 16, 3, 3), (40,)), ((2, 16, 14, 14),)),
    "conv-3x3-deep": (lambda: Function(_conv(padding=1, stride=2), (64, 256, 3, 3), (64,)), ((1, 256, 14, 14),)),
    "conv-1x1": (lambda: Function(_conv(), (72, 48, 1, 1), (72,)), ((3, 48, 9, 9),)),
    "conv-1x1-odd": (lambda: Function(_conv(stride=2), (10, 13, 1, 1), (10,)), ((3, 13, 9, 9),)),
    "conv-dilated": (lambda: Function(_conv(padding=2, dilation=2), (16, 24, 3, 3), (16,)), ((1, 24, 11, 17),)),
    "conv-grouped": (lambda: Function(_conv(padding=1, groups=4), (48, 16, 3, 3), (48,)), ((2, 64, 10, 10),)),
    "conv-grouped-odd": (lambda: Function(_conv(padding=1, groups=3), (15, 3, 3, 3), (15,)), ((2, 9, 10, 10),)),
    "conv-depthwise": (lambda: Function(_conv(padding=1, groups=32), (32, 1, 3, 3), (32,)), ((2, 32, 15, 15),)),
    "conv-depthwise-s2": (
        lambda: Function(_conv(padding=2, stride=2, groups=9), (9, 1, 5, 5), (9,)),
        ((2, 9, 15, 17),),
    ),
    "conv-1d": (lambda: Function(lambda x, w: F.conv1d(x, w, padding=1), (24, 16, 3)), ((2, 16, 33),)),
    "conv-transposed": (
        lambda: Function(lambda x, w: F.conv_transpose2d(x, w, stride=2), (16, 8, 2, 2)),
        ((1, 16, 7, 7),),
    ),
    "residual": (lambda: Function(_residual, (32, 32, 3, 3), (32,)), ((2, 32, 12, 12),)),
    "linear": (lambda: Function(lambda x, w, b: F.gelu(F.linear(x, w, b)), (96, 64), (96,)), ((3, 7, 64),)),
    "linear-odd": (lambda: Function(lambda x, w, b: F.linear(x, w, b), (10, 27), (10,)), ((5, 27),)),
    "linear-deep": (lambda: Function(lambda x, w: F.linear(x, w), (40, 1536)), ((17, 1536),)),
    "matmul": (lambda: Function(lambda x, y: x @ y), ((2, 3, 20, 24), (2, 3, 24, 40))),
    "matmul-turned": (lambda: Function(lambda x, y: x @ y.transpose(-1, -2)), ((4, 33, 32), (4, 17, 32))),
    "matmul-repeated": (lambda: Function(lambda x, y: x @ y), ((2, 3, 16, 24), (1, 24, 16))),
    "self-attention": (lambda: Function(_self_attention, (192, 64), (192,)), ((2, 50, 64),)),
    "attention-long": (
        lambda: Function(lambda q, k: F.scaled_dot_product_attention(q, k, k)),
        ((1, 2, 197, 64), (1, 2, 133, 64)),
    ),
    "attention-many": (
        lambda: Function(lambda q: F.scaled_dot_product_attention(q, q.flip(-1), q)),
        ((40, 8, 70, 32),),
    ),
    "attention-causal": (
        lambda: Function(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True)),
        ((2, 2, 66, 128), (2, 2, 66, 128)),
    ),
    "attention-masked": (lambda: Function(_masked), ((2, 4, 30, 32), (2, 4, 30, 32), (2, 1, 30, 30))),
    "attention-added": (
        lambda: Function(lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m)),
        ((2, 4, 30, 48), (2, 4, 65, 48), (1, 1, 1, 65)),
    ),
    "attention-narrow": (
        lambda: Function(lambda q, k: F.scaled_dot_product_attention(q, k, k)),
        ((2, 4, 30, 12), (2, 4, 30, 12)),
    ),
    "softmax": (lambda: Function(lambda x: F.softmax(x * 3, -1)), ((5, 7, 99),)),
    "softmax-first": (lambda: Function(lambda x: F.softmax(x * 3, 1)), ((5, 7, 9),)),
    "log-softmax": (lambda: Function(lambda x: F.log_softmax(x, -1)), ((5, 1000),)),
    "layer-norm": (lambda: Function(lambda x, w, b: F.layer_norm(x, (96,), w, b), (96,), (96,)), ((3, 50, 96),)),
    "group-norm": (lambda: Function(lambda x, w, b: F.group_norm(x, 4, w, b), (16,), (16,)), ((2, 16, 9, 9),)),
    "rms-norm": (lambda: Function(lambda x, w: F.rms_norm(x, (96,), w), (96,)), ((3, 50, 96),)),
    "max-pool": (lambda: Function(lambda x: F.max_pool2d(x, 3, 2, 1)), ((2, 16, 17, 17),)),
    "avg-pool": (lambda: Function(lambda x: F.avg_pool2d(x, 3, 2, 1, True)), ((2, 16, 17, 17),)),
    "mean": (lambda: Function(lambda x: F.adaptive_avg_pool2d(x, 1)), ((2, 64, 7, 7),)),
    "sum-all": (lambda: Function(lambda x: x.sum()), ((20, 30),)),
    "argmax": (lambda: Function(lambda x: x.argmax(-1)), ((20, 30),)),
    "maximum": (lambda: Function(lambda x: x.amax((1, 2))), ((6, 30, 30),)),
    "concat": (lambda: Function(lambda x, y: torch.cat((x, y, x), 1)), ((2, 8, 5, 5), (2, 3, 5, 5))),
    "shuffle": (lambda: Function(lambda x: x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2) + 1), ((2, 16, 6, 6),)),
    "resize": (lambda: Function(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")), ((1, 8, 6, 6),)),
    "elementwise": (lambda: Function(lambda x, y: torch.tanh(x) * y.sigmoid() + F.silu(x - y)), ((4, 33), (4, 33))),
    "gate": (
        lambda: Function(lambda x, w: x * F.linear(x.mean((2, 3)), w).sigmoid()[:, :, None, None], (32, 32)),
        ((2, 32, 7, 7),),
    ),
    "cumsum": (lambda: Function(lambda x: x.cumsum(-1)), ((4, 40),)),
    "embedding": (lambda: Function(lambda x, w: F.embedding((x * 8).abs().long(), w), (50, 24)), ((3, 9),)),
}
"""Name -> a maker of the module, and the shapes of its inputs."""
