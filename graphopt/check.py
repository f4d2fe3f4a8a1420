"""The numeric check: the same inputs through the model before and after a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from graphopt.errors import CheckFailed
from graphopt.model import Model
from graphopt.precision import full_precision
from graphopt.sample import sample_inputs
from graphopt.transform import Check, Contract

__all__ = ["Oracle", "relative_error", "tolerance"]

_REASSOCIATION = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""What reordering sums may change, relative to the largest output. Every other dtype has to be equal."""
_ROUNDINGS = 8
"""How many times the noise of one rounding of the weights a rewrite may add."""


def tolerance(contract: Contract, dtype: torch.dtype) -> float:
    """The largest relative error that a contract allows for outputs of `dtype`; infinite for a lossy pass."""
    if contract.name == "lossy":
        return float("inf")
    return max(_REASSOCIATION.get(dtype, 0.0), contract.rtol or 0.0)


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest finite absolute reference value; infinite where one is NaN or
    infinite and the other is not the same."""
    if actual.shape != reference.shape or actual.dtype != reference.dtype:
        return float("inf")
    if not reference.numel():
        return 0.0
    if not reference.dtype.is_floating_point and not reference.dtype.is_complex:
        return 0.0 if torch.equal(actual, reference) else float("inf")
    wide = torch.complex128 if reference.dtype.is_complex else torch.float64
    x, y = actual.detach().to(wide), reference.detach().to(wide)
    finite = torch.isfinite(y)
    odd_x, odd_y = x[~finite], y[~finite]
    same = (odd_x == odd_y) | (torch.isnan(odd_x) & torch.isnan(odd_y))
    if not bool(same.all()):
        return float("inf")
    x, y = x[finite], y[finite]
    if not y.numel():
        return 0.0
    difference, scale = float((x - y).abs().max()), float(y.abs().max())
    if difference != difference:
        return float("inf")
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


class Oracle:
    """Remembers what a model computes on seeded (or given) inputs and judges every later version of it. The model
    itself has to stay as it is meanwhile.

    A deep net can amplify rounding beyond any fixed limit (an untrained inception_v3 in float32 is 1e-4 away from
    itself in float64), and an output that is zero but for rounding is nothing else. So what is above the limit is
    compared with `noise`: how far the reference itself moves when every weight is off by one rounding.
    """

    def __init__(self, model: Model, inputs: Sequence[Sequence[torch.Tensor]] | None = None, seed: int = 0) -> None:
        self.seed = seed
        self.model = model
        self.inputs = [list(batch) for batch in inputs] if inputs else [sample_inputs(model, seed=seed)]
        self.reference = self._run(model)

    def judge(self, model: Model, contract: Contract) -> Check:
        """Compare `model` with the reference.

        Raises:
            CheckFailed: when an output differs by more than `contract` allows.
        """
        worst, limit_of_worst = 0.0, float("inf")
        limits = [tolerance(contract, output.dtype) for output in self.reference[0]]
        for outputs, references in zip(self._run(model), self.reference, strict=True):
            for index, (spec, limit, output, reference) in enumerate(
                zip(model.signature.tensor_outputs, limits, outputs, references, strict=True)
            ):
                error = relative_error(output, reference)
                if error > limit and output.dtype.is_floating_point:
                    limit = max(limit, _ROUNDINGS * self.noise[index])
                if error > limit:
                    raise CheckFailed(
                        f"output '{spec.name}' changed by {error:.2e} of the largest reference output, "
                        f"{contract} allows {limit:.0e}"
                    )
                if error >= worst:
                    worst, limit_of_worst = error, limit
        return Check(worst, limit_of_worst, len(self.inputs))

    @cached_property
    def noise(self) -> list[float]:
        """For each output, the largest relative error when every weight is changed by at most one rounding; 0 where
        that makes other infinities or NaN, which excuses nothing."""
        model, generator = self.model.clone(), torch.Generator().manual_seed(self.seed)
        done: set[int] = set()
        with torch.no_grad():
            for tensor in model.params.values():
                if tensor.dtype.is_floating_point and id(tensor) not in done:
                    done.add(id(tensor))
                    offsets = torch.rand(tensor.shape, generator=generator).to(tensor.device) * 2 - 1
                    tensor.mul_(1 + offsets.double() * torch.finfo(tensor.dtype).eps)
        batches = [
            [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
            for ours, theirs in zip(self._run(model), self.reference, strict=True)
        ]
        return [max((e for e in errors if math.isfinite(e)), default=0.0) for errors in zip(*batches, strict=True)]

    def _run(self, model: Model) -> list[list[torch.Tensor]]:
        if model.mode == "train":
            model = model.clone()  # running statistics move with every call
        results = []
        for batch in self.inputs:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), full_precision():
                torch.manual_seed(self.seed)
                results.append(model.call_flat(batch))
        return results
