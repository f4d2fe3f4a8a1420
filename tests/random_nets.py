"""Small nets built from a printable description.

`repr(net)` is Python that builds the same net, weights included. The names in it come from this module
and from `tests.random_steps`.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from tests.random_steps import Again, Shape, Step
from tests.zoo import calibrate, enliven

__all__ = ["Net", "run"]


class Net(nn.Module):
    """The net that `steps` describe, for inputs of `shape` (without the batch), in eval mode.

    Its outputs are the values that no step uses. Weights are drawn from the description itself, none is left
    constant, and batch norms have the statistics of data that went through them.
    """

    def __init__(self, shape: Shape, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.shape, self.steps = tuple(shape), tuple(steps)
        self.layers = nn.ModuleList()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(repr(self).encode()))
            self._build(torch.zeros(2, *self.shape))
            enliven(self)
            calibrate(self, [(torch.randn(8, *self.shape),)])

    def _build(self, example: Tensor) -> None:
        """Make the layer of every step, following shapes by running them."""
        values = [example]
        for step in self.steps:
            layer = self.layers[step.of] if isinstance(step, Again) else step.module(tuple(values[step.x].shape))
            self.layers.append(layer.eval())
            values += run(step, layer, values)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, layer in zip(self.steps, self.layers, strict=True):
            values += run(step, layer, values)
        used = {i for step in self.steps for i in step.inputs}
        return tuple(value for i, value in enumerate(values) if i not in used)

    def args(self, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
        """Inputs of `batch` samples."""
        return (torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed)).to(dtype),)

    def __repr__(self) -> str:
        return f"Net(shape={self.shape!r}, steps={self.steps!r})"


def run(step: Step, layer: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """What `step` appends to `values`: one tensor, or the pieces of a split."""
    output = layer(*(values[i] for i in step.inputs))
    return list(output) if isinstance(output, tuple | list) else [output]
