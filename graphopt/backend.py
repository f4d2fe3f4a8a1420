"""Ways to run a model, and what they make of it.

A `Backend` compiles a model into an `Artifact`, which is called as the model is. Backends are found by name: the
built-in ones below, other people's through the entry-point group `graphopt.backends`
(`name = "module:Class"`); none is imported before it is asked for. Nothing here imports torch, so that a saved
artifact runs without it.
"""

from __future__ import annotations

import importlib
import operator
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphopt import tree
from graphopt.errors import GraphoptError, InputError, LoadError, UnsupportedError, UsageError
from graphopt.manifest import read_manifest
from graphopt.names import nearest
from graphopt.signature import Signature, TensorSpec
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = [
    "GROUP",
    "MOST_THREADS",
    "Artifact",
    "Backend",
    "Timing",
    "Unsupported",
    "backend_names",
    "build",
    "check_exact",
    "check_threads",
    "get_backend",
    "is_torch",
    "load_artifact",
    "refuse",
]

MOST_THREADS = 1024
"""More is taken for a slip: every backend would make as many threads without asking again."""

_MOST_ACCEPTED = 64
"""An artifact with free sizes may be called with any number of shapes; so many are known without asking."""

GROUP = "graphopt.backends"
"""Entry-point group of backends: `mine = "my_package.backend:MyBackend"`."""

_BUILT_IN = {
    "onnxruntime": "graphopt.backends.onnxruntime:OnnxRuntimeBackend",
    "reference": "graphopt.backends.reference:ReferenceBackend",
    "tvm": "graphopt.backends.tvm:TvmBackend",
}


@dataclass(frozen=True)
class Unsupported:
    """One node that a backend cannot run: the operator, the node's name, and why."""

    operator: str
    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.operator} at '{self.node}': {self.why}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def measure(cls, function: Callable[[], object], *, rounds: int, warmup: int) -> Timing:
        """Time a function, after calls that are not counted.

        Raises:
            UsageError: for fewer than one round.
        """
        if rounds < 1 or warmup < 0:
            raise UsageError(f"cannot time {rounds} rounds after {warmup} warm-up calls")
        for _ in range(warmup):
            function()
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if rounds > 1 else times * 3
        return cls(median, q1, q3, rounds)


class Artifact(ABC):
    """A compiled model. Call it as the model is called, or with tensors by position and by input name.

    The tensors are all torch's or all numpy's, and so are those it returns. `record` holds facts about how it was made,
    as JSON has them: the passes, checks of its numbers, measured times. They are saved with it.
    """

    def __init__(self, signature: Signature, target: Target, threads: int) -> None:
        self.signature = signature
        self.target = target
        self.threads = threads
        self.record: dict[str, Any] = {}
        self._accepted: set[tuple[Any, ...]] = set()

    @abstractmethod
    def run(self, tensors: list[Any]) -> list[Any]:
        """Run on the flat, checked tensor inputs, and return the flat tensor outputs of the same kind."""

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the artifact as a folder that `load_artifact` reads.

        Raises:
            UsageError: when the backend cannot save, or the folder cannot be written.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: when structure, dtype or shape of the inputs differ from the signature.
        """
        kinds = None if kwargs else _kinds(args)
        if kinds in self._accepted:
            tensors = list(args)
        else:
            tensors = self._tensors(args, kwargs)
            given_as_run = len(tensors) == len(args) and all(map(operator.is_, tensors, args))
            if kinds is not None and given_as_run and len(self._accepted) < _MOST_ACCEPTED:
                self._accepted.add(kinds)
        results = self.run(tensors)
        return results[0] if self._returns_one_tensor else self._structured(results)

    @cached_property
    def _returns_one_tensor(self) -> bool:
        """Whether the model returns a tensor and no container: what is returned is the result of `run` then."""
        outputs, mark = self.signature.outputs, object()
        alone = len(outputs) == 1 and isinstance(outputs[0], TensorSpec) and bool(self.signature.out_tree)
        return alone and self._structured([mark]) is mark

    def _structured(self, results: list[Any]) -> Any:
        rest = iter(results)
        leaves = [next(rest) if isinstance(spec, TensorSpec) else spec.value for spec in self.signature.outputs]
        return tree.unflatten(leaves, self.signature.out_tree) if self.signature.out_tree else tuple(leaves)

    def bench(self, *args: Any, rounds: int = 20, warmup: int = 3, **kwargs: Any) -> Timing:
        """Time calls on these inputs, without the checks around them. Nothing else should be running."""
        tensors = self._tensors(args, kwargs)
        return Timing.measure(lambda: self.run(tensors), rounds=rounds, warmup=warmup)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        leaves = self._by_name(args, kwargs)
        if leaves is None:
            leaves = tree.flatten((args, kwargs), self.signature.in_tree)
        tensors = []
        for spec, leaf in zip(self.signature.inputs, leaves, strict=True):
            if isinstance(spec, TensorSpec):
                tensors.append(leaf)
            elif leaf is not spec and (type(leaf) is not type(spec.value) or leaf != spec.value):
                raise InputError(
                    f"input '{spec.name}' is {leaf!r}, the model was captured with {spec.value!r}",
                    todo="capture the model again with this value",
                )
        _require_one_kind(self.signature, tensors)
        self.signature.check([(_dtype_name(tensor), tuple(tensor.shape)) for tensor in tensors])
        return tensors

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """Leaves in order when only tensors are given, by position and by name; constants may be left out."""
        if not all(_is_tensor(value) for value in (*args, *kwargs.values())):
            return None
        specs = self.signature.tensor_inputs
        names = [spec.name for spec in specs]
        if len(args) + len(kwargs) != len(specs) or set(kwargs) != set(names[len(args) :]):
            return None
        given = dict(zip(names, args, strict=False)) | kwargs
        return [given[spec.name] if isinstance(spec, TensorSpec) else spec for spec in self.signature.inputs]


class Backend(ABC):
    """A way to run models."""

    name: ClassVar[str]
    exact_float: ClassVar[Literal["option", "always", "never"]] = "never"
    """Whether `compile` takes `exact_float`, computes so in any case, or cannot promise it."""
    tunes: ClassVar[bool] = False
    """Whether `compile` takes `tuned`, a database of measured choices."""

    @abstractmethod
    def supports(self, model: Model) -> list[Unsupported]:
        """Everything in the model that this backend cannot run; empty when it can be compiled."""

    @abstractmethod
    def compile(
        self, model: Model, target: Target, *, threads: int | None = None, exact_float: bool = False
    ) -> Artifact:
        """Make the model runnable on a target, with the target's number of threads unless another is given.

        Args:
            exact_float: use no algorithm that rounds more than the plain one; only given where the backend takes it.

        Raises:
            UnsupportedError: naming everything that cannot be run, at once.
        """

    @classmethod
    def require_parts(cls, target: Target) -> None:
        """Ask, before anything is compiled, for what saving an artifact for a target needs: compilers, libraries.

        Raises:
            UsageError, UnsupportedError: naming what is missing, and where it is to be had.
        """
        del target  # most backends need nothing

    @classmethod
    def load(cls, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Read an artifact that this backend saved.

        Raises:
            LoadError: when files are missing or damaged.
        """
        raise LoadError(f"the backend '{cls.name}' does not save artifacts", where=str(directory))


def refuse(backend: str, problems: list[Unsupported]) -> UnsupportedError:
    """The error that names everything a backend cannot run."""
    shown = [str(problem) for problem in problems]
    return UnsupportedError(
        f"the backend '{backend}' cannot run {len(problems)} node{'s' if len(problems) > 1 else ''} of this model",
        where="\n".join(shown),
        todo="run it with the backend 'reference', or replace these operators in the model",
    )


def backend_names() -> list[str]:
    """All backends that can be asked for."""
    return sorted(_homes())


def _homes() -> dict[str, str]:
    homes = dict(_BUILT_IN)
    for point in entry_points(group=GROUP):
        if homes.get(point.name, point.value) != point.value:
            raise GraphoptError(f"two backends are called '{point.name}': {homes[point.name]} and {point.value}")
        homes[point.name] = point.value
    return homes


def get_backend(name: str) -> type[Backend]:
    """The class of a backend, imported now.

    Raises:
        UsageError: when no backend has that name.
    """
    homes = _homes()
    if name not in homes:
        raise UsageError(f"there is no backend '{name}'", todo=nearest(name, homes))
    module, _, attribute = homes[name].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), attribute)
    return found


def build(
    model: Model,
    target: Target | str = "cpu",
    backend: str = "tvm",
    *,
    threads: int | None = None,
    exact_float: bool = False,
    tuned: str | os.PathLike[str] | None = None,
) -> Artifact:
    """Compile a model: `build(model, target="cpu")(x)`.

    Args:
        target: a Target, a preset's name, JSON text or the path of a JSON file.
        backend: `tvm`, `onnxruntime`, `reference`, or one that another package brings.
        threads: how many threads the artifact uses; the target's number of cores by default.
        exact_float: use no algorithm that rounds more than the plain one, such as Winograd's convolution.
        tuned: the database in which `graphopt.tune` keeps what it measured: its best choices are used. `shipped` is
            the one that comes with the package.

    Raises:
        UsageError: for an unknown target or backend, a number of threads that is none (see `check_threads`), or exact
            floating point from a backend that cannot promise it.
        UnsupportedError: naming everything that the backend cannot run.
    """
    where = Target.parse(target) if isinstance(target, str) else target
    check_threads(where.cores if threads is None else threads)
    compiler = get_backend(backend)
    check_exact(compiler, exact_float)
    options: dict[str, Any] = {"exact_float": True} if exact_float and compiler.exact_float == "option" else {}
    if tuned is not None:
        if not compiler.tunes:
            raise UsageError(
                f"the backend '{backend}' takes no measured choices",
                todo="use the backend 'tvm', or leave --tuned (tuned=...) out",
            )
        options["tuned"] = tuned
    artifact = compiler().compile(model, where, threads=threads, **options)
    artifact.record["history"] = list(model.history)
    return artifact


def check_exact(backend: type[Backend], exact_float: bool) -> None:
    """Refuse exact floating point where a backend cannot promise it.

    Raises:
        UsageError: naming the backend, and those that can.
    """
    if exact_float and backend.exact_float == "never":
        raise UsageError(
            f"the backend '{backend.name}' does not know exact floating point",
            why="it chooses its algorithms itself, and does not tell which of them round more than the plain ones",
            todo="use the backend 'tvm' or 'reference', or leave --exact-float (exact_float=True) out",
        )


def check_threads(threads: int, where: str | None = None) -> None:
    """Refuse a number of threads that is below one, absurd, or no number.

    Raises:
        UsageError: naming the number and what is allowed.
    """
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise UsageError(
            f"a model cannot run on {threads!r} threads",
            where=where,
            why=f"the number of threads is from 1 to {MOST_THREADS}",
            todo="name as many as the machine has cores, or leave it out to use the target's cores",
        )


def load_artifact(directory: str | os.PathLike[str]) -> Artifact:
    """Read a saved artifact. Needs neither torch nor a compiler.

    Raises:
        LoadError: when the folder is not an artifact, or is damaged.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    return get_backend(str(manifest["backend"])).load(folder, manifest)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__dlpack__")


def _kinds(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the signature asks of tensors; None where one of the values is none. What a small net takes is little
    more than what Python takes to look at every size, so that inputs like earlier ones are not looked at again."""
    try:
        kinds = tuple([(type(value), value.dtype, value.shape) for value in values])
        hash(kinds)
    except (AttributeError, TypeError):  # no tensor, or one of another package's whose shape is a list
        return None
    return kinds


def is_torch(value: Any) -> bool:
    """Whether a value is a torch tensor; asks without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch" or hasattr(value, "requires_grad")


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_one_kind(signature: Signature, tensors: list[Any]) -> None:
    for spec, tensor in zip(signature.tensor_inputs, tensors, strict=True):
        if not _is_tensor(tensor):
            raise InputError(f"input '{spec.name}' is a {type(tensor).__name__}, the model takes a tensor")
    if len({is_torch(tensor) for tensor in tensors}) > 1:
        raise InputError("some inputs are torch tensors and others are not", todo="pass one kind")
