"""How much of a layer's error arrives at the outputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from graphopt.model import Model
from graphopt.passes._factor_problem import Problem
from graphopt.passes._output_error import OutputError
from graphopt.passes._rank_options import Option
from graphopt.rewriter import Rewriter

__all__ = ["Influence"]

_SAMPLES = 128
_HOPELESS = 1e9
_ROUNDING = 1e-8
"""Error of a layer: what arrives of a smaller one can be nothing by chance, and the layer would count nothing."""


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
        leaves about `part` of the layer's cost, and does more than rounding."""
        tried = [option for option in options[1:] if option.error > 0]
        if not tried:
            return 1.0
        seen = [option for option in tried if option.error > _ROUNDING] or [max(tried, key=lambda one: one.error)]
        option = min(seen, key=lambda one: abs(one.cost - part * options[0].cost))
        assert option.form is not None
        copy = self.model.clone(share_tensors=True)
        rw = Rewriter(copy)
        whole = problem.whole.onto(rw)
        factors = option.form.factors(problem, option.ranks)
        # No name for what is in float64: it is gone before it is stored.
        weight = whole.stored(option.form.dense(problem.whole, factors)).to(rw.params[str(whole.weight.target)])
        rw.set_tensor(whole.weight, weight, "tried")
        del factors, weight
        copy.touch()
        lost = self.outputs.of(copy) ** 2
        return lost / option.error if lost < _HOPELESS else _HOPELESS  # NaN as well
