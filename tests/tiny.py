"""Hand-written nets of a few layers, each with one thing in it that has gone wrong somewhere before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.zoo import calibrate, enliven

__all__ = ["NAMES", "Detections", "TinyNet", "build"]


@dataclass(frozen=True)
class TinyNet:
    """A net in eval mode, a maker of its positional inputs, and which of their axes may vary."""

    name: str
    module: nn.Module
    make_args: Callable[[int], tuple[Any, ...]]
    dynamic: dict[str, dict[int, str]]

    def args(self, batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
        """Inputs of `batch` samples."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make_args(batch)


@dataclass
class Detections:
    """What `dataclass_output` returns."""

    scores: Tensor
    boxes: Tensor


pytree.register_dataclass(Detections, serialized_type_name="tests.tiny.Detections")


class ConvBnRelu(nn.Sequential):
    """The plainest fold."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SharedConv(nn.Module):
    """One convolution used twice, once followed by a batch norm, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return x + self.conv(y)


class Depthwise(nn.Module):
    """Depthwise then pointwise, each with a batch norm, in ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.bn0 = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.pointwise, self.bn1 = nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn1(self.pointwise(F.relu6(self.bn0(self.depthwise(x))))))


class TransposedGrouped(nn.Module):
    """A transposed convolution keeps its weight as [in, out/groups, kh, kw]: outputs on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(x))


class NormAfterRelu(nn.Module):
    """A batch norm that may go forwards into the next convolution only where no padding is in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.padded, self.unpadded = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(F.relu(self.conv(x)))
        return self.padded(y) + self.unpadded(y)


class TiedHead(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.embedding(x))))


class Attention(nn.Module):
    """A pre-norm transformer block; with fewer key and value heads than query heads they are repeated."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, kv_heads * self.size) for _ in range(2))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        y = x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)
        return y.repeat_interleave(self.heads // heads, dim=1) if heads < self.heads else y

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm0(x)
        q = self._split(self.query(y), self.heads)
        k, v = self._split(self.key(y), self.kv_heads), self._split(self.value(y), self.kv_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm1(x))))


class ChannelShuffle(nn.Module):
    """Chunk, shuffle through a view, concatenate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, self.conv(right)), dim=1)
        n, c, h, w = y.shape
        return self.last(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class StackFlipRoll(nn.Module):
    """Data movement that is not element-wise though shapes stay the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        both = torch.stack((y.flip(1), y.roll(2, dims=1)), dim=2).flatten(1, 2)
        return self.last(both)


class DictInOut(nn.Module):
    """A dict of inputs, a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.extra = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Any]:
        image, extra = self.image(x["image"]), self.extra(x["extra"])
        return {"sum": image + extra, "parts": [image, (extra,)]}


class DataclassOut(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.scores, self.boxes = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Detections:
        y = F.silu(self.bn(self.body(x)))
        return Detections(self.scores(y).sigmoid(), self.boxes(y))


class InPlace(nn.Module):
    """In-place operators on intermediate values, one of them seen through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.add_(1)
        y[:, 2:5].mul_(2)
        return self.second(F.relu_(y))


class Dropout(nn.Module):
    """Dropout that must do nothing in eval mode and something in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(F.relu(self.first(x)), 0.5, self.training))


class SplitOutputs(nn.Module):
    """Several outputs of unequal widths, one of which is also used inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(6, 9), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = self.body(x).split([2, 3, 4], dim=1)
        return self.last(a), b, torch.tanh(c) + a.sum(1, keepdim=True)


class Gate(nn.Module):
    """Squeeze and excitation: a product of a map and a value per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn(self.conv(x)))
        return y * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))


class DynamicReshape(nn.Module):
    """Two dynamic axes, and reshapes whose sizes are computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = F.relu(self.first(x)).reshape(batch * length, 2, 4).sum(1)
        return self.second(y).view(batch, length, 3)


def _images(channels: int, size: int = 8) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _vectors(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (torch.randn(batch, *shape),)


def _dict(batch: int) -> tuple[dict[str, Tensor]]:
    return ({"image": torch.randn(batch, 6), "extra": torch.randn(batch, 3)},)


Dynamic = dict[str, dict[int, str]]
STATIC: Dynamic = {}
BATCH: Dynamic = {"x": {0: "batch"}}

_NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]], Dynamic]] = {
    "conv_bn_relu": (ConvBnRelu, _images(3), BATCH),
    "shared_conv": (SharedConv, _images(4), BATCH),
    "depthwise": (Depthwise, _images(6), BATCH),
    "transposed_grouped": (TransposedGrouped, _images(6, 5), BATCH),
    "norm_after_relu": (NormAfterRelu, _images(3), BATCH),
    "tied_head": (TiedHead, lambda batch: (torch.randint(0, 40, (batch, 5)),), BATCH),
    "attention": (Attention, _vectors(5, 16), BATCH),
    "grouped_query": (lambda: Attention(kv_heads=2), _vectors(5, 16), BATCH),
    "channel_shuffle": (ChannelShuffle, _images(8), BATCH),
    "stack_flip_roll": (StackFlipRoll, _images(3), BATCH),
    "dict_in_out": (DictInOut, _dict, STATIC),
    "dataclass_output": (DataclassOut, _images(3), BATCH),
    "in_place": (InPlace, _vectors(6), BATCH),
    "dropout": (Dropout, _vectors(6), BATCH),
    "split_outputs": (SplitOutputs, _vectors(6), BATCH),
    "gate": (Gate, _images(3), BATCH),
    "dynamic_reshape": (DynamicReshape, _vectors(7, 6), {"x": {0: "batch", 1: "length"}}),
}
NAMES = tuple(_NETS)


def build(name: str) -> TinyNet:
    """The net called `name`, the same every time."""
    make, make_args, dynamic = _NETS[name]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyNet(name, make(), make_args, dynamic)
        enliven(net.module)
        calibrate(net.module, [net.args(8, seed) for seed in (1, 2)])
    return net
