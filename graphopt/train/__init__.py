"""The short training that recovery needs, optimizers that bring whole units to zero, and training of low rank.

They work in a loop of your own too: everything here is plain torch.
"""

from __future__ import annotations

from graphopt.train.dhspg import DHSPG
from graphopt.train.distill import Distill
from graphopt.train.dlrt import DLRT
from graphopt.train.factors import Factored, as_factors
from graphopt.train.finetune import Batches, Diverged, Training, finetune
from graphopt.train.group_sl import GroupSL
from graphopt.train.hesso import HESSO, HESSOCric
from graphopt.train.maestro import Maestro
from graphopt.train.sparse import SparseOptimizer

__all__ = [
    "DHSPG",
    "DLRT",
    "HESSO",
    "Batches",
    "Distill",
    "Diverged",
    "Factored",
    "GroupSL",
    "HESSOCric",
    "Maestro",
    "SparseOptimizer",
    "Training",
    "as_factors",
    "finetune",
]
