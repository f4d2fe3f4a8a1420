"""Reproducers: what a failed pipeline leaves behind so that somebody else can run it again."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt import __version__
from graphopt.archive import save_gopt
from graphopt.errors import UsageError
from graphopt.files import write_whole
from graphopt.model import Model

if TYPE_CHECKING:
    from graphopt.pipeline import Pipeline

__all__ = ["write_reproducer"]

_FACTS = "repro.json"
SEED = 0
"""Seed of the stand-in weights."""


def write_reproducer(directory: Path, model: Model, pipeline: Pipeline, passed: int, error: str) -> None:
    """Write `model.gopt` (the graph with seeded stand-in weights, so that no trained weight leaves the house) and
    `repro.json` (pipeline text, how many passes had succeeded, the error, versions) into `directory`."""
    stand_in = model.clone(share_tensors=True)
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in list(stand_in.params.items()):
        if tensor.is_floating_point():
            scale = max(tensor.shape[1:].numel() if tensor.ndim > 1 else 1, 1) ** -0.5
            drawn = (
                torch.rand(tensor.shape, generator=generator) * scale
                if tensor.ndim < 2
                else (torch.randn(tensor.shape, generator=generator) * scale)
            )
            stand_in.params.set(name, drawn.to(tensor.dtype))
    facts = {
        "pipeline": str(pipeline),
        "passes_done": passed,
        "error": error,
        "seed": SEED,
        "versions": {"graphopt": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if directory.exists() and not (directory / _FACTS).exists():
        raise UsageError(f"'{directory}' is no reproducer and is not replaced by one", todo="name a folder that is new")
    with write_whole(directory) as scratch:
        scratch.mkdir()
        save_gopt(stand_in, scratch / "model.gopt")
        (scratch / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
