"""A random net between a layer that makes its channels and layers that read everything that comes out of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.random_nets import Net

__all__ = ["Read"]


class Read(nn.Module):
    """`net` gets what a layer makes along axis 1, or along the last axis of inputs without places; each of its outputs
    is flattened and read by a linear layer. So nothing inside is an input or an output."""

    def __init__(self, net: Net, along_last: bool = False) -> None:
        super().__init__()
        self.net, self.shape = net, net.shape
        self.along_last = along_last or len(net.shape) == 1
        channels = net.shape[-1 if self.along_last else 0]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Linear(channels, channels)
            made = net(self._stemmed(torch.zeros(2, *net.shape)))
            self.heads = nn.ModuleList(nn.Linear(value[0].numel(), 3) for value in made)

    def _stemmed(self, x: Tensor) -> Tensor:
        if self.along_last:
            return self.stem(x)
        return self.stem(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.net(self._stemmed(x))
        return tuple(head(value.flatten(1)) for head, value in zip(self.heads, made, strict=True))

    def __repr__(self) -> str:
        return f"Read({self.net!r}, {self.along_last})"
