"""EfficientNet-Lite0 with pretrained ImageNet weights, and the photos to try it on.

The architecture is that of the EfficientNet-Lite release: EfficientNet-B0 (arXiv:1905.11946) without
squeeze and excitation, with ReLU6 in place of swish and with stem and head of fixed width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import corpora

__all__ = ["EfficientNetLite0", "class_names", "photo", "pretrained"]

# Kernel, stride, expansion, output channels, repeats of each stage of inverted residuals.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
RESOLUTION = 224


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME does for sizes that the stride divides."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # The odd pixel of padding, which a stride of 2 leaves, goes to the right and the bottom.
        before, after = (kernel - stride) // 2, kernel - stride - (kernel - stride) // 2
        self.extra = after - before
        super().__init__(channels, out, kernel, stride, padding=before, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.extra:
            return super().forward(x)
        before, after = int(self.padding[0]), int(self.padding[0]) + self.extra
        padded = F.pad(x, (before, after, before, after))
        return F.conv2d(padded, self.weight, None, self.stride, 0, self.dilation, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project, add where shapes allow: [n, c, h, w] -> [n, out, h/s, w/s]."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and channels == out
        if self.expands:
            self.expand_conv, self.bn0 = SameConv2d(channels, wide, 1), _norm(wide)
        self.depthwise_conv, self.bn1 = SameConv2d(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self.project_conv, self.bn2 = SameConv2d(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        out: Tensor = x + y if self.adds else y
        return out


class EfficientNetLite0(nn.Module):
    """[n, 3, h, w] -> logits [n, classes]; h and w multiples of 32."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, 32, 3, stride=2), _norm(32)
        blocks, channels = [], 32
        for kernel, stride, expansion, out, repeats in STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, out, kernel, 1 if index else stride, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv2d(channels, 1280, 1), _norm(1280)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(x)))
        x = F.relu6(self.bn1(self.conv_head(self.blocks(x))))
        logits: Tensor = self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return logits


def pretrained() -> EfficientNetLite0:
    """The net with its ImageNet weights, in eval mode. Raises `corpora.Unavailable`."""
    state = torch.load(corpora.path("efficientnet-lite0"), map_location="cpu", weights_only=True)
    net = EfficientNetLite0()
    net.load_state_dict({name.removeprefix("_").replace("._", "."): value for name, value in state.items()})
    return net.eval()


def photo(file: Path, resolution: int = RESOLUTION) -> Tensor:
    """A picture scaled to 8/7 of `resolution`, cut to its centre and normalised: [1, 3, h, w] float32."""
    with Image.open(file) as image:
        scale = resolution * 8 / 7 / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    pixels = np.array(scaled.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    # The Lite nets were trained on (pixel - 127) / 128, not on ImageNet's mean and deviation.
    return ((torch.from_numpy(pixels).permute(2, 0, 1) - 127) / 128)[None]


def class_names() -> list[str]:
    """English names of the 1000 ImageNet classes, in the order of the logits."""
    rows = corpora.path("imagenet-names").read_text(encoding="utf-8").splitlines()
    names = dict(row.split("\t", 1) for row in rows)
    return [names[synset] for synset in corpora.path("imagenet-synsets").read_text(encoding="utf-8").split()]
