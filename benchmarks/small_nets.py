"""Four small nets for small images: a residual net, a plain one, one of depthwise layers, and a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETS", "small_net"]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class _Residual(nn.Module):
    """Two convolutions beside the identity, or a projection (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(inputs, outputs, 3, stride), _conv(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class _Inverted(nn.Module):
    """Widened by 1x1, depthwise, narrowed by 1x1, beside the identity (Sandler et al., MobileNetV2, 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand, self.depthwise = _conv(inputs, wide, 1), _conv(wide, wide, 3, stride, wide)
        self.project = _conv(wide, outputs, 1)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(functional.relu6(self.depthwise(functional.relu6(self.expand(x)))))
        return x + y if self.same else y


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        # No width is written down, so that pruners which cannot change code get through.
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, -1))


class _Layer(nn.Module):
    """A transformer's layer with the norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    """Patches of 4 x 4 pixels (Dosovitskiy et al., ViT, 2021), with the mean of all in the place of a class token."""

    def __init__(self, channels: int, size: int, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, (size // 4) ** 2, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


def _classifier(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def _resnet(channels: int) -> nn.Module:
    widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    return nn.Sequential(
        _conv(channels, 32, 3, 2), nn.ReLU(), *(_Residual(*width) for width in widths), *_classifier(128)
    )


def _vgg(channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in (32, 0, 64, 0, 128, 128, 0, 256, 256):
        layers += [_conv(channels, width), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers, *_classifier(channels))


def _mobilenet(channels: int) -> nn.Module:
    blocks = [(16, 24, 1, 4), (24, 24, 1, 4), (24, 40, 2, 4), (40, 40, 1, 4), (40, 80, 2, 4), (80, 80, 1, 4)]
    return nn.Sequential(
        _conv(channels, 16, 3, 2),
        nn.ReLU6(),
        *(_Inverted(*block) for block in blocks),
        _conv(80, 256, 1),
        nn.ReLU6(),
        *_classifier(256),
    )


NETS = ("resnet", "vgg", "mobilenet", "vit")


def small_net(name: str, channels: int, size: int) -> nn.Module:
    """The net called `name` for images [n, channels, size, size] of ten classes, with fresh weights."""
    if name == "vit":
        return _Transformer(channels, size)
    return {"resnet": _resnet, "vgg": _vgg, "mobilenet": _mobilenet}[name](channels)
