"""Reproducers: what a failed pipeline leaves behind so that somebody else can run it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt import __version__
from graphopt.archive import load_gopt, save_gopt
from graphopt.errors import LoadError, UsageError
from graphopt.files import write_whole
from graphopt.model import Model

if TYPE_CHECKING:
    from graphopt.pipeline import Pipeline

__all__ = ["Reproducer", "read_reproducer", "versions", "write_reproducer"]

_FACTS, _MODEL = "repro.json", "model.gopt"
SEED = 0
"""Seed of the stand-in weights."""


@dataclass(frozen=True)
class Reproducer:
    """What a failed pipeline has left: the graph with stand-in weights, how it was run, and the error of that time."""

    model: Model
    pipeline: str
    check: bool
    limit: int | None
    error: str
    versions: Mapping[str, str]


def write_reproducer(
    directory: Path,
    model: Model,
    pipeline: Pipeline,
    passed: int,
    error: str,
    *,
    check: bool = True,
    limit: int | None = None,
) -> None:
    """Write `model.gopt` (the graph with seeded stand-in weights, so that no trained weight leaves the house) and
    `repro.json` (pipeline text, how it was run, how many passes had succeeded, the error, versions) into `directory`.
    """
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
        "check": check,
        "limit": limit,
        "passes_done": passed,
        "error": error,
        "seed": SEED,
        "versions": versions(),
    }
    if directory.exists() and not (directory / _FACTS).exists():
        raise UsageError(f"'{directory}' is no reproducer and is not replaced by one", todo="name a folder that is new")
    with write_whole(directory) as scratch:
        scratch.mkdir()
        save_gopt(stand_in, scratch / _MODEL)
        (scratch / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def read_reproducer(directory: Path) -> Reproducer:
    """Read what `write_reproducer` wrote.

    Raises:
        LoadError: when the folder is none, or is damaged.
    """
    try:
        facts = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
        limit = facts["limit"]
        return Reproducer(
            load_gopt(directory / _MODEL),
            str(facts["pipeline"]),
            bool(facts["check"]),
            None if limit is None else int(limit),
            str(facts["error"]),
            {str(name): str(version) for name, version in facts["versions"].items()},
        )
    except OSError as error:
        raise LoadError(
            f"'{directory}' is no reproducer: {error.strerror or error}",
            where=error.filename,
            todo="name a folder that `graphopt opt --repro` has written",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"'{directory / _FACTS}' is damaged", why=f"{type(error).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Of what a failure may depend on."""
    return {"graphopt": __version__, "torch": torch.__version__, "python": platform.python_version()}
