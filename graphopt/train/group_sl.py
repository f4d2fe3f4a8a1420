"""Group sparsity learning: a penalty that gathers what a group holds in few of its units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.train.units import trainable_units

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["GroupSL"]


class GroupSL:
    """The regulariser of DepGraph, for use with any optimizer: call `add_gradients` after `backward`.

    With I_k the sum of squares of all weights that go with unit k of a group, those that read it included, the gradient
    of a weight w of the unit becomes larger by strength * 2^(alpha (max I - I_k) / (max I - min I)) * w: the less there
    is in a unit, the faster it decays. Afterwards `prune-channels` finds units that are nearly nothing.

    Args:
        model: to train.
        strength: of the penalty on the largest unit of each group; may be changed at any time.
        alpha: 2^alpha is how much stronger the penalty on the smallest one is.
        only, leave: names of groups to take and to leave alone.

    Raises:
        UsageError: for a negative strength or alpha, and a group that does not exist.

    Source:
        Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3.3.
    """

    def __init__(
        self,
        model: Model,
        strength: float = 1e-4,
        *,
        alpha: float = 4.0,
        only: Sequence[str] = (),
        leave: Sequence[str] = (),
    ) -> None:
        if strength < 0 or alpha < 0:
            raise UsageError(f"strength is {strength:g} and alpha {alpha:g}, they have to be at least 0")
        self.strength, self.alpha = strength, alpha
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.units = trainable_units(model, trained, only=only, leave=leave, readers=True)

    def weights(self) -> Tensor:
        """[units] by how much more than the largest one of its group each is penalised."""
        importance = self.units.sums(torch.square)
        found = torch.ones_like(importance)
        for span in self.units.spans:
            mine = importance[span.start : span.stop]
            width = mine.max() - mine.min()
            if width > 0:
                found[span.start : span.stop] = 2 ** (self.alpha * (mine.max() - mine) / width)
        return found

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of the penalty to those that the parameters have."""
        weights = self.strength * self.weights()
        for block in self.units.blocks:
            if block.tensor.grad is not None:
                block.tensor.grad.add_(block.spread(weights.to(block.tensor.dtype), 0) * block.tensor)
