"""Seconds that compiled code takes: of a layer by itself, remembered on disk, and of two models side by side.

A layer is compiled for the target with its own shapes, once and several times in one program, and the difference
counts: a program has a start that a layer in the middle of a model has not. Its time is kept in an SQLite file under
what it depends on: operator, shapes, arguments, target, threads, backend, processor and versions. So a second look is
instant, and machines of one kind can share the file. `GRAPHOPT_CACHE` names another folder than the cache of the user.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node, map_arg

from graphopt import __version__
from graphopt.backend import Artifact, build
from graphopt.cpus import processor
from graphopt.errors import UsageError
from graphopt.fake import Shapes
from graphopt.model import Model
from graphopt.ops import arguments
from graphopt.target import Target

__all__ = ["LatencyTable", "Stopwatch", "cache_folder", "runs_here"]

_TURNS, _CALLS = (8, 200), 4
"""How often two models take turns, at least and at most, and how many calls a turn has."""
_SECONDS = {"model": 1.0, "layer": 0.1}
"""For which they take turns when they are fast."""
_COPIES = 5
_LEAST = 1e-7
"""Seconds of a layer that takes no measurable time."""


def cache_folder() -> Path:
    """Where measurements are kept."""
    given = os.environ.get("GRAPHOPT_CACHE")
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("graphopt")


def runs_here(target: Target) -> bool:
    """Whether code for a target can be timed on this machine."""
    here = Target.parse("cpu")
    return target.kind == here.kind and target.arch == here.arch and target.needs <= here.needs


@dataclass(frozen=True)
class Stopwatch:
    """Compiles for a target that this machine can run, and times.

    Raises:
        UsageError: when it cannot run the target's code.
    """

    target: Target
    threads: int | None = None
    backend: str = "tvm"

    def __post_init__(self) -> None:
        if not runs_here(self.target):
            raise UsageError(
                f"the latency on '{self.target.cpu or self.target.arch}' cannot be measured here",
                why="this machine cannot run code for that target",
                todo="measure on a machine of that kind, or give a budget in macs or params",
            )

    def build(self, model: Model) -> Artifact:
        return build(model, self.target, self.backend, threads=self.threads)

    def ratio(self, model: Artifact, other: Artifact, inputs: Sequence[torch.Tensor]) -> float:
        """Seconds of `model` over those of `other`, which take turns on the same inputs: the median of the turns."""
        tensors = list(inputs)
        turns = _turns(lambda: model.run(tensors), lambda: other.run(tensors), _SECONDS["model"])
        return statistics.median(one / two for one, two in turns)


def _turns(one: Callable[[], object], two: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    """Seconds of two calls that take turns; of every turn the fastest call counts, as what other processes take, they
    take from single calls."""
    found: list[tuple[float, float]] = []
    start = time.perf_counter()
    least, most = _TURNS
    while len(found) <= least or (len(found) < most and time.perf_counter() - start < seconds):
        found.append((_fastest(one), _fastest(two)))
    return found[1:]  # the first one warms up


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class LatencyTable:
    """Seconds of single layers, from the file or measured now, at the sizes of the user's example.

    Args:
        shapes: of the model that the layers are of.
    """

    def __init__(self, watch: Stopwatch, shapes: Shapes, folder: Path | None = None) -> None:
        self.watch, self.shapes = watch, shapes
        self.path = (folder or cache_folder()) / "latency.sqlite"
        self.measured = 0
        self._where = _surroundings(watch)

    def seconds(self, node: Node) -> float:
        """What the call of `node` takes by itself."""
        key = self.key(node)
        known = self._read(key)
        if known is None:
            known = self._measure(node)
            self.measured += 1
            self._write(key, known)
        return known

    def key(self, node: Node) -> str:
        """Everything that the time of a call depends on, as a digest."""
        text = json.dumps([str(node.target), self._plain(arguments(node)), self._where], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _plain(self, value: Any) -> Any:
        """Arguments as JSON: tensors as their dtype and shape, sizes as numbers."""
        if isinstance(value, Node):
            value = value.meta.get("val")
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), [self.shapes.number(size) for size in value.shape]]
        if isinstance(value, Mapping):
            return {key: self._plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        value = self.shapes.number(value) if isinstance(value, torch.SymInt) else value
        return value if isinstance(value, int | float | str | None) else str(value)

    def _measure(self, node: Node) -> float:
        """What further calls take beside a first one: a run has a start of its own, which may take longer."""
        first, all_of_them = (self._runnable(node, copies) for copies in (1, _COPIES))
        turns = _turns(first, all_of_them, _SECONDS["layer"])
        return max(_LEAST, statistics.median(many - one for one, many in turns) / (_COPIES - 1))

    def _runnable(self, node: Node, copies: int) -> Callable[[], object]:
        from graphopt.frontends.torch import capture

        layers = [_isolated(node, self.shapes, seed) for seed in range(copies)]
        inputs = [tensor for _, given in layers for tensor in given]
        artifact = self.watch.build(capture(_Layers([layer for layer, _ in layers]).eval(), inputs))
        return lambda: artifact.run(inputs)

    def _read(self, key: str) -> float | None:
        if not self.path.exists():
            return None
        with closing(self._open()) as file:
            row = file.execute("SELECT seconds FROM latency WHERE key = ?", (key,)).fetchone()
        return None if row is None else float(row[0])

    def _write(self, key: str, seconds: float) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as file, file:
            file.execute("INSERT OR REPLACE INTO latency VALUES (?, ?)", (key, seconds))

    def _open(self) -> sqlite3.Connection:
        try:
            file = sqlite3.connect(self.path, timeout=30)
            file.execute("CREATE TABLE IF NOT EXISTS latency (key TEXT PRIMARY KEY, seconds REAL NOT NULL)")
        except sqlite3.Error as error:
            raise UsageError(
                f"the file of measured latencies '{self.path}' cannot be used",
                why=str(error),
                todo="delete it, or name another folder in GRAPHOPT_CACHE",
            ) from error
        return file


class _Layer(nn.Module):
    """One call with weights of its own, drawn anew: a time does not depend on values."""

    def __init__(self, call: Callable[..., Any], weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.call = call
        for name, weight in weights.items():
            floating = weight.dtype.is_floating_point
            self.register_parameter(name, nn.Parameter(weight)) if floating else self.register_buffer(name, weight)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, inputs)


class _Layers(nn.Module):
    """Layers beside each other, each with inputs of its own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> Any:
        each = len(inputs) // len(self.layers)
        return [layer(*inputs[i * each : (i + 1) * each]) for i, layer in enumerate(self.layers)]


def _isolated(node: Node, shapes: Shapes, seed: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A module that does what `node` does, and inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), torch.Tensor)]
    stored = {used: f"weight_{i}" for i, used in enumerate(tensors) if used.op == "get_attr"}
    given = [used for used in tensors if used not in stored]

    def call(layer: _Layer, inputs: tuple[torch.Tensor, ...]) -> Any:
        def value(used: Node) -> Any:
            if used in stored:
                return getattr(layer, stored[used])
            return inputs[given.index(used)] if used in given else shapes.number(used.meta["val"])

        args, kwargs = map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # an overload

    weights = {name: _drawn(used, shapes, generator) for used, name in stored.items()}
    return _Layer(call, weights), tuple(_drawn(used, shapes, generator) for used in given)


def _drawn(node: Node, shapes: Shapes, generator: torch.Generator) -> torch.Tensor:
    value = node.meta["val"]
    shape = [shapes.number(size) for size in value.shape]
    if not value.dtype.is_floating_point:
        return torch.zeros(shape, dtype=value.dtype)
    return torch.randn(shape, generator=generator).to(value.dtype)


def _surroundings(watch: Stopwatch) -> dict[str, Any]:
    versions = {"graphopt": __version__}
    for package in ("apache-tvm", "onnxruntime", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "target": watch.target.to_json(),
        "threads": watch.threads or watch.target.cores,
        "backend": watch.backend,
        "copies": _COPIES,
        "processor": processor(),
        "versions": versions,
    }
