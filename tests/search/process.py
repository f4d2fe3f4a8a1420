"""A process that searches: `python -m tests.search.process STORAGE TRIALS SECONDS-OF-A-TRIAL`; prints what it tried."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

import graphopt as go
from graphopt.model import Model
from graphopt.search import judge
from tests.search.nets import CountedLatency, batches, model

PASSES = "prune-channels{macs=0.2..0.95,step=1,importance=magnitude|l1,branches=false,refit=false}"


class SlowLatency(CountedLatency):
    def timer(self, deployed: Model) -> Callable[[], float]:
        time.sleep(float(sys.argv[3]))
        return super().timer(deployed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    judge.Deployed = SlowLatency  # type: ignore[misc, assignment]
    print("ready", flush=True)
    ran: list[str] = []
    go.search(
        model(),
        calib=batches(),
        passes=PASSES,
        trials=int(sys.argv[2]),
        backend="reference",
        storage=sys.argv[1],
        tell=lambda progress: ran.append(progress.last.pipeline) if progress.last else None,
    )
    print(json.dumps(ran))
