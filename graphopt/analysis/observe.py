"""Looking at activations while a model runs on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from graphopt.model import Model
from graphopt.signature import TensorSpec

__all__ = ["observe"]


def observe(
    model: Model, batches: Sequence[Sequence[torch.Tensor]], watch: Mapping[Node, Callable[[torch.Tensor], None]]
) -> None:
    """Run the model, in eval mode as it is, on every batch and show each watcher what its node has made."""
    with torch.no_grad():
        for batch in batches:
            leaves = iter(batch)
            values = [next(leaves) if isinstance(s, TensorSpec) else s.value for s in model.signature.inputs]
            _Observed(model.module, watch).run(*values, enable_io_processing=False)


class _Observed(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watch: Mapping[Node, Callable[[torch.Tensor], None]]) -> None:
        super().__init__(module)
        self.watch = watch

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if n in self.watch:
            self.watch[n](made)
        return made
