"""Small nets, each with one thing in it that pruners get wrong, and what may be removed from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETS", "build"]


class Between(nn.Module):
    """Two convolutions with something in between that moves channels."""

    def __init__(self, move: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.move = move
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.move(torch.sigmoid(self.norm(self.first(x)))))


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


PERMUTATION = [3, 1, 7, 0, 2, 6, 5, 4]


class BareWeight(nn.Module):
    """A convolution whose weight is a parameter of the net itself, 3 x 3 on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.w, self.last = nn.Parameter(torch.randn(3, 3, 3, 3)), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(F.conv2d(self.first(x), self.w, padding=1)))


class EinsumWeight(nn.Module):
    """A product with a parameter, written as an equation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w, self.last = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 10)), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(torch.einsum("nk,kj->nj", F.silu(self.first(x)), self.w)))


class WeightFirst(nn.Module):
    """Products whose first operand is the stored one, once as an equation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,ni->no", self.b, torch.tanh(self.a @ x.t()).t())


class TiedHead(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.back = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.back(F.gelu(self.mid(x))))


class Residual(nn.Module):
    """Two blocks whose outputs are added, and a norm after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.na, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.na(self.a(x))))
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


class Flattened(nn.Module):
    """Channels times places are the features of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.elu(self.first(F.elu(self.conv(x)).flatten(1))))


class Grouped(nn.Module):
    """A grouped convolution between two dense ones, group norm, and one with a multiplier of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.norm, self.wide, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.wide(F.silu(self.norm(self.mid(F.silu(self.first(x))))))))


class TransposedGroups(nn.Module):
    """Transposed convolutions keep outputs on the second axis of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.norm, self.deep, self.last = (
            nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, 6, 3, groups=6),
            nn.ConvTranspose2d(6, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.deep(torch.tanh(self.norm(self.up(torch.tanh(self.first(x))))))))


class Attention(nn.Module):
    """A transformer block; heads of keys and values may be fewer, and repeated in one of three ways."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, repeat: str = "interleave", fused: bool = False) -> None:
        super().__init__()
        width, self.size = 24, 6
        self.heads, self.kv_heads, self.repeat, self.fused = heads, kv_heads, repeat, fused
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * heads * self.size)
        else:
            self.query, self.key, self.value = (nn.Linear(width, n * self.size) for n in (heads, kv_heads, kv_heads))
        self.out, self.up, self.down = nn.Linear(heads * self.size, width), nn.Linear(width, 32), nn.Linear(32, width)
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], count, self.size).transpose(1, 2)

    def _mixed(self, y: Tensor) -> Tensor:
        n, length, _ = y.shape
        if self.fused:
            q, k, v = self.qkv(y).reshape(n, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                self._heads(self.query(y), self.heads),
                *(self._heads(m(y), self.kv_heads) for m in (self.key, self.value)),
            )
        times = self.heads // self.kv_heads
        if self.repeat == "gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if times > 1 and self.repeat == "expand":
            k, v = (
                z[:, :, None].expand(n, -1, times, -1, -1).reshape(n, self.heads, length, self.size) for z in (k, v)
            )
        elif times > 1:
            k, v = (z.repeat_interleave(times, 1) for z in (k, v))
        if self.repeat == "by hand":
            return (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.out(self._mixed(self.norm0(x)).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(x)


class BiasTable(Attention):
    """Scores by hand plus a learnt bias for every head, as in a Swin transformer."""

    def __init__(self) -> None:
        super().__init__(repeat="by hand", fused=True)
        self.table = nn.Parameter(torch.randn(13, 4))
        self.register_buffer("places", torch.arange(7)[:, None] - torch.arange(7)[None] + 6)

    def _mixed(self, y: Tensor) -> Tensor:
        n, length, _ = y.shape
        q, k, v = self.qkv(y).reshape(n, length, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.places.view(-1)].view(7, 7, -1).permute(2, 0, 1).contiguous()
        return (q @ k.transpose(-2, -1) * 6**-0.5 + bias.unsqueeze(0)).softmax(-1) @ v


class C2f(nn.Module):
    """YOLO's block: halves, bottlenecks on one of them, everything concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cv1, self.cv2 = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 12, 1), nn.Conv2d(24, 8, 1)
        self.m = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1)) for _ in range(2)
        )
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.cv1(F.silu(self.stem(x)))).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + block(y[-1]))
        return self.last(F.silu(self.cv2(torch.cat(y, 1))))


class UNet(nn.Module):
    """Skips are concatenated after upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, 2, 1)
        self.up, self.mid, self.last = (
            nn.ConvTranspose2d(10, 6, 2, 2),
            nn.Conv2d(18, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.down(x))
        b = F.silu(self.deep(a))
        resized = F.interpolate(self.down(x), scale_factor=2.0, mode="nearest")
        y = torch.cat((a, self.up(b), F.max_pool2d(resized, 2)), 1)
        return self.last(F.silu(self.mid(y)))


class Experts(nn.Module):
    """Two experts behind a softmax gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(6, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        gates = self.gate(x).softmax(-1)
        return self.last(x + sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))


class SqueezeExcite(nn.Module):
    """A gate for each channel, computed from all of them; and one that is broadcast over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.place, self.last = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = x * self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        pooled = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return self.last(x * self.place(pooled).sigmoid())


class PaddedShortcut(nn.Module):
    """The narrow branch is padded with channels of zeros before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.last(torch.relu(self.wide(x)) + F.pad(x, (0, 0, 0, 0, 2, 2)))


class Gated(nn.Module):
    """A gated linear unit, RMS norm by hand, a constant that varies along the channels, and learnt scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.last = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("ramp", torch.arange(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale
        return self.last(F.glu(self.gate(x), -1) * self.ramp)


class Rotary(Attention):
    """Heads turned by angles, as in Llama: halves of the features change places."""

    def _mixed(self, y: Tensor) -> Tensor:
        q, k, v = (self._heads(m(y), self.heads) for m in (self.query, self.key, self.value))
        angles = torch.arange(y.shape[1])[:, None] / 10.0 ** torch.arange(3)
        angles = torch.cat((angles, angles), -1)

        def turned(x: Tensor) -> Tensor:
            half = self.size // 2
            return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()

        return F.scaled_dot_product_attention(turned(q), turned(k), v)


def image(channels: int = 3, size: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size),)


def tokens() -> tuple[Tensor]:
    return (torch.randn(2, 7, 5),)


def ids() -> tuple[Tensor]:
    return (torch.randint(0, 10, (2, 7)),)


Made = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int]

NETS: dict[str, Made] = {
    "plain": (lambda: Between(lambda x: x), image, 8),
    "flip": (lambda: Between(lambda x: x.flip(1)), image, 8),
    "shuffle": (lambda: Between(shuffle), image, 4),
    "roll": (lambda: Between(lambda x: x.roll(3, 1)), image, 8),
    "stack": (lambda: Between(lambda x: torch.stack((x, x.flip(1)), 2).flatten(1, 2), 16), image, 4),
    "repeat": (lambda: Between(lambda x: x.repeat(1, 2, 1, 1), 16), image, 8),
    "repeat_interleave": (lambda: Between(lambda x: x.repeat_interleave(3, 1), 24), image, 8),
    "permuted": (lambda: Between(lambda x: x[:, PERMUTATION]), image, 8),
    "every_other": (lambda: Between(lambda x: x[:, ::2] * x[:, 1::2], 4), image, 4),
    "pixel_shuffle": (lambda: Between(lambda x: F.pixel_shuffle(x, 2), 2), image, 2),
    "softmax_over": (lambda: Between(lambda x: x.softmax(1)), image, 0),
    "sorted": (lambda: Between(lambda x: x.sort(1).values), image, 0),
    "bare_weight": (BareWeight, image, 3),
    "einsum": (EinsumWeight, lambda: (torch.randn(2, 6),), 8),
    "weight_first": (WeightFirst, lambda: (torch.randn(2, 6),), 8),
    "tied": (TiedHead, ids, 12),
    "residual": (Residual, image, 8),
    "flattened": (Flattened, image, 6),
    "grouped": (Grouped, image, 4),
    "transposed": (TransposedGroups, image, 2),
    "attention": (Attention, tokens, 6),
    "fused": (lambda: Attention(fused=True), tokens, 6),
    "by_hand": (lambda: Attention(repeat="by hand"), tokens, 6),
    "grouped_queries": (lambda: Attention(4, 2), tokens, 6),
    "grouped_queries_expand": (lambda: Attention(4, 2, "expand"), tokens, 6),
    "grouped_queries_flag": (lambda: Attention(4, 2, "gqa"), tokens, 6),
    "bias_table": (BiasTable, tokens, 4),
    "rotary": (Rotary, tokens, 3),
    "c2f": (C2f, image, 6),
    "unet": (UNet, image, 6),
    "experts": (Experts, lambda: (torch.randn(2, 6),), 12),
    "squeeze_excite": (SqueezeExcite, image, 8),
    "padded_shortcut": (PaddedShortcut, image, 6),
    "gated": (Gated, tokens, 8),
}
"""Name -> how to make the net, its inputs, and how many units a group of it has at least."""


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...], int]:
    make, args, units = NETS[name]
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for buffer_name, buffer in net.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_()
            elif buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return net.eval(), args(), units
