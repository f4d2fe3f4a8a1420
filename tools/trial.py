"""A compiled model tried on seeded inputs, before it is written: its numbers against PyTorch's, and its time."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.backend import Artifact, Timing
from graphopt.check import relative_error
from graphopt.errors import CheckFailed
from graphopt.model import Model
from graphopt.precision import full_precision
from graphopt.sample import sample_inputs, usual_inputs

__all__ = ["compared", "timed"]

_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What is taken for other code than the model's, relative to the largest output; other dtypes have to be equal."""


def compared(artifact: Artifact, model: Model) -> dict[str, Any]:
    """The largest difference from PyTorch, relative to the largest output, rounded up to one digit.

    Raises:
        CheckFailed: when an output differs by more than rounding explains.
    """
    inputs = sample_inputs(model)
    with torch.no_grad(), full_precision():
        references = model.call_flat(inputs)
    worst = 0.0
    for spec, result, reference in zip(model.signature.tensor_outputs, artifact.run(inputs), references, strict=True):
        error = relative_error(result.cpu(), reference)
        limit = _LIMITS.get(reference.dtype, 0.0)
        if error > limit:
            raise CheckFailed(
                f"output '{spec.name}' of the compiled model differs by {error:.1e} of the largest output",
                why=f"rounding explains {limit:.0e}; either it is wrong, or the model amplifies rounding",
                todo="try --exact-float; --no-check writes the bundle all the same",
            )
        worst = max(worst, error)
    return {"against": "PyTorch, seeded inputs", "error": _rounded_up(worst)}


def timed(artifact: Artifact, model: Model) -> dict[str, Any]:
    """Milliseconds of a call on inputs of the example's sizes: the median, and the quartiles around it."""
    inputs = usual_inputs(model)
    timing = Timing.measure(lambda: artifact.run(inputs), rounds=20, warmup=3)
    times = {name: round(1000 * seconds, 3) for name, seconds in (("ms", timing.median), ("q1", timing.q1))}
    return times | {"q3": round(1000 * timing.q3, 3), "rounds": timing.rounds}


def _rounded_up(error: float) -> float:
    if error <= 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(error))
    return float(f"{math.ceil(error / unit) * unit:.0e}")
