"""What one convolution in the place of several layers loses, measured, and remembered on disk.

The region is replaced alone, by a convolution that is fitted to what the region makes on the calibration data, and the
outputs are compared. Losses are kept under everything that they depend on, so that another budget asks for nothing, and
a run that was broken off goes on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from graphopt.analysis.observe import observe
from graphopt.errors import UsageError
from graphopt.files import write_whole
from graphopt.measure import cache_folder
from graphopt.model import Model
from graphopt.passes._linearise import start
from graphopt.passes._merge_table import Candidate, Replacement
from graphopt.passes._merged_layer import why_not_finite
from graphopt.passes._output_error import OutputError
from graphopt.passes._regression import fitted
from graphopt.rewriter import Rewriter

__all__ = ["Batches", "Losses", "values_at"]

Batches = Sequence[Sequence[Tensor]]


class Losses:
    """What candidates lose, measured or remembered.

    Args:
        importance: `calibration`, the square of the error of all outputs relative to their size; or `MODULE:FUNCTION`,
            what a function of the user's says of a model, less what it says of the original.
        tune: epochs of training a candidate towards the original's outputs, before it is judged.
    """

    def __init__(self, model: Model, batches: Batches, importance: str, tune: int) -> None:
        self.model, self.batches, self.tune = model, batches, tune
        self.error = OutputError(model, batches)
        self.judge = _judge(importance, self.error, model)
        self.file = _file(model, batches, importance, tune)
        self.known: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def of(self, wanted: Sequence[Candidate]) -> dict[str, float]:
        """By label."""
        missing: dict[str, list[Candidate]] = defaultdict(list)
        for one in wanted:
            if one.label not in self.known:
                missing[one.part.source.name].append(one)
        total = sum(map(len, missing.values()))
        with _shown(total) as advance:
            for source, group in missing.items():
                values = values_at(self.model, self.batches, {source, *(one.part.target.name for one in group)})
                for one in group:
                    self.known[one.label] = self._measured(one, values)
                    self._keep()
                    advance()
        return {one.label: self.known[one.label] for one in wanted}

    def _measured(self, one: Candidate, values: dict[str, list[Tensor]]) -> float:
        copy = self.model.clone(share_tensors=not self.tune)
        rw = Rewriter(copy)
        replacement = Replacement(rw)
        part = replacement.region(one)
        xs, ys = values[part.source.name], values[part.target.name]
        kernel = fitted(start(rw, part, one.size), xs, ys)
        if why_not_finite(kernel, ys[0].dtype) is not None:
            return _HOPELESS
        replacement.replace(part, kernel)
        copy.touch()
        if self.tune:
            _train(copy, self.model, self.batches, self.tune)
        loss = self.judge(copy)
        return loss if loss < _HOPELESS else _HOPELESS  # NaN as well

    def _keep(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(self.file) as scratch:
            scratch.write_text(json.dumps(self.known, indent=1) + "\n")


_HOPELESS = 1e9
"""The loss of what is no number."""


def _judge(importance: str, error: OutputError, original: Model) -> Callable[[Model], float]:
    if importance == "calibration":
        return lambda model: error.of(model) ** 2
    module, _, name = importance.partition(":")
    try:
        function: Callable[[Model], float] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as failure:
        raise UsageError(
            f"there is no importance '{importance}'",
            why=str(failure),
            todo="give `calibration`, or MODULE:FUNCTION of a function that says of a model what it loses",
        ) from failure
    before = float(function(original))
    return lambda model: float(function(model)) - before


def _train(model: Model, original: Model, batches: Batches, epochs: int) -> None:
    from graphopt.train import finetune

    data = [(tuple(batch), None) for batch in batches]
    finetune(model, data, epochs=epochs, lr=1e-3, teacher=original, progress=False)
    model.eval()


def values_at(model: Model, batches: Batches, names: set[str]) -> dict[str, list[Tensor]]:
    """What nodes of these names make on every batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    observe(model, batches, {node: found[node.name].append for node in model.graph.nodes if node.name in names})
    return found


def _file(model: Model, batches: Batches, importance: str, tune: int) -> Path:
    digest = hashlib.sha256(f"{model}\n{importance}\n{tune}\n{torch.__version__}\n".encode())
    tensors = [*model.params.values(), *(tensor for batch in batches for tensor in batch)]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return cache_folder() / "merging" / f"{digest.hexdigest()[:32]}.json"


@contextmanager
def _shown(total: int) -> Iterator[Callable[[], None]]:
    """A function that is called after every candidate; a bar on stderr, if that is a terminal."""
    if not total or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("what merged layers lose", total=total)
        yield lambda: bar.advance(task)
