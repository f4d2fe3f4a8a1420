"""Eager PyTorch: slow, exact, and what every other backend is compared with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphopt.backend import Artifact, Backend, Unsupported, is_torch
from graphopt.errors import UsageError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["ReferenceArtifact", "ReferenceBackend"]


class ReferenceArtifact(Artifact):
    """A copy of the model, run by PyTorch without gradients."""

    def __init__(self, model: Model, target: Target, threads: int) -> None:
        super().__init__(model.signature, target, threads)
        self._model = model.clone()

    def run(self, tensors: list[Any]) -> list[Any]:
        import torch

        given = [tensor if is_torch(tensor) else torch.from_numpy(tensor.copy()) for tensor in tensors]
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                results = self._model.call_flat(given)
        finally:
            torch.set_num_threads(before)
        return results if any(is_torch(tensor) for tensor in tensors) else [result.numpy() for result in results]

    def save(self, directory: str | os.PathLike[str]) -> None:
        raise UsageError("the backend 'reference' saves nothing", todo="save the model itself: model.save('net.gopt')")


class ReferenceBackend(Backend):
    """Runs everything that PyTorch runs."""

    name: ClassVar[str] = "reference"
    exact_float: ClassVar[Literal["option", "always", "never"]] = "always"

    def supports(self, model: Model) -> list[Unsupported]:
        return []

    def compile(
        self, model: Model, target: Target, *, threads: int | None = None, exact_float: bool = True
    ) -> Artifact:
        return ReferenceArtifact(model, target, threads or target.cores)
