"""Modules whose own numbers have to follow when a model of them is pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "HardCoded", "Images", "Normed", "Tokens", "TorchAttention", "inputs"]


class Images(nn.Module):
    """Batch norms and a residual sum, grouped and depthwise convolutions, group norm, and a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up, self.mid, self.down = (
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Conv2d(12, 8, 1),
        )
        self.groups, self.group_norm = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.GroupNorm(4, 8)
        self.features = 8 * 16
        self.head = nn.Linear(self.features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.down(torch.relu(self.mid(F.silu(self.up(x)))))
        x = F.avg_pool2d(F.silu(self.group_norm(self.groups(x))), 2)
        return self.head(x.reshape(-1, self.features))


class Attention(nn.Module):
    """Attention as most people write it; `scale` says who divides the scores, and by what."""

    def __init__(self, fused: bool, scale: str, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, width // heads, fused
        self.factor = {"kept": self.head_dim**-0.5}.get(scale)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                layer(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
        y = F.scaled_dot_product_attention(q, k, v, scale=self.factor)
        return self.out(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class Tokens(nn.Module):
    """Two blocks between a token embedding and a head that are one weight."""

    def __init__(self, fused: bool = False, scale: str = "default") -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.blocks = nn.ModuleList(Attention(fused, scale) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = y + block(self.norm(y))
        return self.head(y + self.mlp(y))


class TorchAttention(nn.Module):
    """Torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 5)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)))


class HardCoded(nn.Module):
    """Its code has a width that nothing can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y.view(-1, 2, 4).flatten(1))


class Normed(nn.Module):
    """A layer whose weight is computed, and buffers of both kinds that are as long as the layer is wide."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        first = nn.Linear(6, 8)
        self.first = nn.utils.parametrizations.weight_norm(first) if normed else first
        self.last = nn.Linear(8, 3)
        self.register_buffer("shift", torch.rand(8))
        self.register_buffer("ramp", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.shift) * self.ramp)


def inputs(net: nn.Module, batch: int = 3) -> tuple[Tensor, ...]:
    """Example inputs for any of them."""
    if isinstance(net, Tokens | TorchAttention):
        return (torch.randint(0, 11, (batch, 7)),)
    return (torch.randn(batch, 3, 8, 8),) if isinstance(net, Images) else (torch.randn(batch, 6),)
