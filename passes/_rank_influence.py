"""How much of a layer's error arrives at the outputs, and what the outputs' gradients say about its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from graphopt.model import Model
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Problem
from graphopt.passes._output_error import OutputError
from graphopt.passes._rank_options import Option
from graphopt.rewriter import Rewriter

__all__ = ["Influence", "fisher_rows"]

_DIRECTIONS = 4
_SAMPLES = 128
_HOPELESS = 1e9


class Influence:
    """Measures by trying: one factorisation of one layer, everything else as it is, on the first batches of the
    calibration data."""

    def __init__(self, model: Model, calib: Sequence[Sequence[Tensor]]) -> None:
        self.model = model
        sizes = accumulate(max((len(value) for value in batch if value.dim()), default=1) for batch in calib)
        count = sum(size < _SAMPLES for size in sizes) + 1
        self.outputs = OutputError(model, calib[:count])

    def of(self, problem: Problem, options: Sequence[Option], part: float) -> float:
        """The square of the relative error of the outputs, for each unit of a layer's own error: of the option that
        leaves about `part` of the layer's cost."""
        tried = [option for option in options[1:] if option.error > 0]
        if not tried:
            return 1.0
        option = min(tried, key=lambda one: abs(one.cost - part * options[0].cost))
        assert option.form is not None
        dense = option.form.dense(problem.whole, option.form.factors(problem, option.ranks))
        copy = self.model.clone(share_tensors=True)
        rw = Rewriter(copy)
        whole = problem.whole.onto(rw)
        rw.set_tensor(whole.weight, whole.stored(dense).to(rw.params[str(whole.weight.target)]), "tried")
        copy.touch()
        lost = self.outputs.of(copy) ** 2
        return lost / option.error if lost < _HOPELESS else _HOPELESS  # NaN as well


def fisher_rows(
    model: Model, calib: Sequence[Sequence[Tensor]], layers: Sequence[Whole], seed: int
) -> dict[str, Tensor]:
    """What each output of a layer counts, by the layer's name: [out], the empirical Fisher information of the weights
    that make it, summed over them, for random directions of the model's outputs.

    (Hsu et al., Language Model Compression with Weighted Low-Rank Factorization, ICLR 2022, section 3.)
    """
    copy = model.clone()
    weights = {whole.node.name: copy.params[str(whole.weight.target)] for whole in layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = {name: torch.zeros((), dtype=torch.float64) for name in weights}
    generator = torch.Generator().manual_seed(seed)
    for batch in calib:
        outputs = [y for y in copy.call_flat(batch) if y.is_floating_point() and y.requires_grad]
        for _ in range(_DIRECTIONS if outputs else 0):
            signs = [torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1 for y in outputs]
            found = torch.autograd.grad(outputs, list(weights.values()), signs, allow_unused=True, retain_graph=True)
            for whole, gradient in zip(layers, found, strict=True):
                if gradient is not None:
                    sums[whole.node.name] = sums[whole.node.name] + _by_output(whole, gradient.double().square())
    return {name: total for name, total in sums.items() if total.dim() and bool(total.any())}


def _by_output(whole: Whole, squares: Tensor) -> Tensor:
    """Summed over all but the axis of the outputs."""
    if whole.embedding or whole.across:
        return squares.sum(0)
    return squares.flatten(1).sum(1)
