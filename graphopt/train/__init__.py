"""The short training that recovery needs, and optimizers that bring whole units to zero.

They work in a loop of your own too: everything here is plain torch.
"""

from __future__ import annotations

from graphopt.train.dhspg import DHSPG
from graphopt.train.distill import Distill
from graphopt.train.finetune import Batches, Diverged, Training, finetune
from graphopt.train.group_sl import GroupSL
from graphopt.train.hesso import HESSO, HESSOCric
from graphopt.train.sparse import SparseOptimizer

__all__ = [
    "DHSPG",
    "HESSO",
    "Batches",
    "Distill",
    "Diverged",
    "GroupSL",
    "HESSOCric",
    "SparseOptimizer",
    "Training",
    "finetune",
]
