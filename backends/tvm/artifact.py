"""A compiled model that runs on TVM's runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graphopt.backend import Artifact, is_torch
from graphopt.backends.tvm.runtime import Machine, to_numpy
from graphopt.errors import UsageError
from graphopt.signature import Signature
from graphopt.target import Target, why_not_here

if TYPE_CHECKING:
    from graphopt.backends.tvm.kernels.coverage import Coverage
    from graphopt.backends.tvm.lower import Built

__all__ = ["TvmArtifact"]


class TvmArtifact(Artifact):
    """Native code and weights.

    Args:
        module: the runtime module that holds the code.
        weights: TVM tensors, the arguments of the code after the user's inputs.
        built: what the compiler made, for an artifact compiled in this process; only such a one can be saved.
        exact_float: whether it was compiled to use no algorithm that rounds more than the plain one.
    """

    def __init__(
        self,
        signature: Signature,
        target: Target,
        threads: int,
        module: Any,
        weights: list[Any],
        built: Built | None = None,
        *,
        exact_float: bool = False,
    ) -> None:
        super().__init__(signature, target, threads)
        self.weights = weights
        self.built = built
        self.exact_float = exact_float
        self._machine = None if module is None else Machine(module, weights, threads)

    def run(self, tensors: list[Any]) -> list[Any]:
        if self._machine is None:
            raise self._foreign()
        results = self._machine.run(tensors)
        return results if any(map(is_torch, tensors)) else [to_numpy(result) for result in results]

    @contextmanager
    def watched(self, watch: Callable[..., int]) -> Iterator[None]:
        """Have the virtual machine call `watch(function, name, before, result, *arguments)` around every function."""
        if self._machine is None:
            raise self._foreign()
        self._machine.watch(watch)
        try:
            yield
        finally:
            self._machine.watch(None)

    @property
    def coverage(self) -> Coverage:
        """Which rule wrote each function of the code.

        Raises:
            UsageError: for an artifact that was loaded from a folder, which holds the code alone.
        """
        if self.built is None:
            raise UsageError(
                "this artifact was loaded from a folder", todo="build the model again to see what wrote it"
            )
        return self.built.coverage

    def save(self, directory: str | os.PathLike[str]) -> None:
        from graphopt.backends.tvm.saved import save

        save(self, directory)

    def _foreign(self) -> Exception:
        return UsageError(
            f"this artifact is code for {self.target.arch} {self.target.cpu}, which this machine cannot run",
            why=why_not_here(self.target),
            todo="save it and run it there, or build the model for this machine: --target cpu",
        )
