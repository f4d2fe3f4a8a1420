"""How far the outputs of a model are from those of another, on calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.model import Model

__all__ = ["OutputError"]

Batches = Sequence[Sequence[Tensor]]


class OutputError:
    """The root of the mean square of the differences of all outputs in floating point, relative to the original's.

    Attributes:
        size: sum of the squares of the original's outputs; 0 where there is nothing that errors could be relative to,
            and not finite where the outputs are not.
    """

    def __init__(self, original: Model, batches: Batches) -> None:
        self.batches = batches
        self.expected = [_floats(original, batch) for batch in batches]
        self.size = sum(float(y.double().square().sum()) for outputs in self.expected for y in outputs)

    def of(self, model: Model) -> float:
        """Of a model in evaluation mode; not finite where its outputs are not."""
        difference = 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            for a, b in zip(_floats(model, batch), expected, strict=True):
                difference += float((a.double() - b.double()).square().sum())
        return math.sqrt(difference / self.size) if self.size else 0.0


def _floats(model: Model, batch: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in model.call_flat(batch) if y.is_floating_point()]
