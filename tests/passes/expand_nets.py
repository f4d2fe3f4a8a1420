"""Small transformers, written by hand, for tests of expansions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETS", "Gpt", "GptLayer", "Llama", "Vit", "images", "tokens"]


class Gpt(nn.Module):
    """Causal attention whose queries, keys and values are split off one layer; scores by hand; a GELU written out."""

    def __init__(self, width: int = 12, heads: int = 3, hidden: int = 10, tied: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, width), nn.Parameter(0.3 * torch.randn(7, width))
        self.layers = nn.ModuleList(GptLayer(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class GptLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * heads * self.size), nn.Linear(heads * self.size, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.register_buffer("mask", torch.full((7, 7), float("-inf")).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        split = self.qkv(self.norm0(x)).split(self.heads * self.size, 2)
        q, k, v = (part.view(n, length, self.heads, self.size).transpose(1, 2) for part in split)
        scores = q @ k.transpose(-1, -2) * self.size**-0.5 + self.mask[:length, :length]
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, self.heads * self.size))
        y = self.up(self.norm1(x))
        return x + self.down(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.045 * y**3))))


class Vit(nn.Module):
    """Patches of images; queries, keys and values are one box of one layer."""

    def __init__(self, width: int = 12, heads: int = 2, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(VitLayer(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(x.shape[0], -1, -1), x), 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class VitLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm0(x)).reshape(n, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1))
        return x + self.down(self.drop(F.gelu(self.up(self.norm1(x)))))


class Llama(nn.Module):
    """RMS norms, one of them written out, rotary embeddings, heads of queries that share keys, a gated MLP."""

    def __init__(self, width: int = 12, heads: int = 4, kv_heads: int = 2, size: int = 4, hidden: int = 10) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, width), nn.ModuleList()
        self.layers.extend(LlamaLayer(width, heads, kv_heads, size, hidden) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, size: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.scale, self.norm1 = nn.Parameter(torch.rand(width) + 0.5), nn.RMSNorm(width, 1e-5)
        self.query, self.out = nn.Linear(width, heads * size, bias=False), nn.Linear(heads * size, width, bias=False)
        self.key, self.value = (nn.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        half = self.size // 2
        angles = torch.arange(x.shape[2])[:, None] / 10.0 ** torch.arange(half)
        angles = torch.cat((angles, angles), -1).to(x.dtype)
        return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        y = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale
        q, k, v = (
            layer(y).view(n, length, count, self.size).transpose(1, 2)
            for layer, count in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (self.turned(k), v))
        mixed = F.scaled_dot_product_attention(self.turned(q), k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, self.heads * self.size))
        y = self.norm1(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def tokens(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (batch, 7), generator=torch.Generator().manual_seed(seed))


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


NETS = {"gpt": (Gpt, tokens), "vit": (Vit, images), "llama": (Llama, tokens)}
