"""A compiled model that runs on TVM's runtime."""

from __future__ import annotations

import os
from typing import Any

from graphopt.backend import Artifact, is_torch
from graphopt.backends.tvm.runtime import Machine, to_numpy, use_threads
from graphopt.signature import Signature
from graphopt.target import Target

__all__ = ["TvmArtifact"]


class TvmArtifact(Artifact):
    """Native code and weights.

    Args:
        module: the runtime module that holds the code.
        weights: TVM tensors, the arguments of the code after the user's inputs.
        executable: what the compiler made, for an artifact compiled in this process; only such a one can be saved.
    """

    def __init__(
        self,
        signature: Signature,
        target: Target,
        threads: int,
        module: Any,
        weights: list[Any],
        executable: Any = None,
    ) -> None:
        super().__init__(signature, target, threads)
        self.weights = weights
        self.executable = executable
        self._machine = None if module is None else Machine(module, weights)

    def run(self, tensors: list[Any]) -> list[Any]:
        if self._machine is None:
            raise self._foreign()
        use_threads(self.threads)
        results = self._machine.run(tensors)
        if any(is_torch(tensor) for tensor in tensors):
            from torch.utils.dlpack import from_dlpack

            return [from_dlpack(result) for result in results]
        return [to_numpy(result) for result in results]

    def save(self, directory: str | os.PathLike[str]) -> None:
        from graphopt.backends.tvm.saved import save

        save(self, directory)

    def _foreign(self) -> Exception:
        from graphopt.errors import UsageError

        return UsageError(
            f"this artifact is code for {self.target.arch} {self.target.cpu}, which this machine cannot run",
            todo="save it and run it there",
        )
