"""What a model's kernels take next to what the machine allows them, for the roofline table of the latency benchmark.

A kernel is allowed the longer of two times: its operations at the measured ceiling of multiply-adds, its bytes at that
of memory. Winograd's and Strassen's kernels count the operations that they do, which are fewer than the model's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.ceilings import measured_ceilings
from graphopt.backends.tvm.profile import RUNTIME, profile
from graphopt.tools.roofline import least_seconds

__all__ = ["roofline"]

ROUNDS = 7


def roofline(artifact: TvmArtifact, inputs: list[torch.Tensor]) -> dict[str, Any]:
    """Ceilings, what they allow in all, and by the rule that wrote the kernels: milliseconds taken and allowed."""
    ceilings = measured_ceilings(artifact.threads)
    rules = {name: rule for rule, names in artifact.coverage.rules.items() for name in names}
    taken: dict[str, float] = defaultdict(float)
    allowed: dict[str, float] = defaultdict(float)
    flops = moved = 0
    for kernel in profile(artifact, inputs, rounds=ROUNDS).kernels:
        rule = "between kernels" if kernel.name == RUNTIME else rules.get(kernel.name, "general")
        taken[rule] += kernel.seconds * 1e3
        allowed[rule] += (least_seconds(kernel, ceilings) or 0) * 1e3
        flops, moved = flops + (kernel.flops or 0), moved + (kernel.bytes or 0)
    return {
        "gflops_per_second": round(ceilings.flops / 1e9, 1),
        "gb_per_second": round(ceilings.bytes / 1e9, 1),
        "gflop": round(flops / 1e9, 4),
        "mb_moved": round(moved / 1e6, 2),
        "allowed_ms": round(sum(allowed.values()), 6),
        "rules": {rule: [round(taken[rule], 6), round(allowed[rule], 6)] for rule in taken},
    }
