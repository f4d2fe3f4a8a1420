"""A model compiled for a GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphopt.backend import Artifact, is_torch
from graphopt.backends.tvm.cuda.runtime import GpuMachine, hand_over, require_gpu
from graphopt.errors import UsageError
from graphopt.signature import Signature
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.backends.tvm.cuda.lower import BuiltForGpu
    from graphopt.backends.tvm.kernels.coverage import Coverage

__all__ = ["GpuArtifact"]

Weight = tuple[str, tuple[int, ...], Any]
"""Dtype, shape, and the bytes as a numpy array."""


class GpuArtifact(Artifact):
    """Code of a host and of a GPU, and weights. The GPU is asked for at the first call, not before.

    Args:
        library: gives the runtime module that holds the host's code.
        source, code: the CUDA source of the kernels, and the machine code that it is run as.
        weights: the arguments of the code after the user's inputs.
        built: what the compiler made, for an artifact compiled in this process; only such a one can be saved.
    """

    def __init__(
        self,
        signature: Signature,
        target: Target,
        library: Callable[[], Any],
        source: str,
        code: bytes,
        weights: list[Weight],
        built: BuiltForGpu | None = None,
    ) -> None:
        super().__init__(signature, target, 1)
        self.source, self.code = source, code
        self.weights = weights
        self.built = built
        self._library = library
        self._machine: GpuMachine | None = None
        self._starting = threading.Lock()

    def run(self, tensors: list[Any]) -> list[Any]:
        """Torch tensors give torch tensors on the GPU, as soon as the work is queued; numpy arrays give numpy arrays.

        Raises:
            UnsupportedError: where there is no GPU that the code runs on.
        """
        machine = self.machine()
        results = machine.run(tensors)
        if any(is_torch(tensor) for tensor in tensors):
            from torch.utils.dlpack import from_dlpack

            return [from_dlpack(result) for result in results]
        return [machine.fetched(result) for result in results]

    def machine(self) -> GpuMachine:
        """The code, loaded onto the GPU."""
        with self._starting:
            if self._machine is None:
                require_gpu(self.target.arch)
                if self.source:
                    hand_over(self.source, self.code)
                self._machine = GpuMachine(self._library(), self.weights)
            return self._machine

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
        from graphopt.backends.tvm.cuda.saved import save

        save(self, directory)
