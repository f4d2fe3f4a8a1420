"""ONNX Runtime, by way of `torch.onnx.export`."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.backend import Artifact, Backend, Unsupported, check_exact, is_torch, refuse
from graphopt.errors import GraphoptError
from graphopt.files import write_whole
from graphopt.signature import Signature
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["OnnxRuntimeArtifact", "OnnxRuntimeBackend"]


class OnnxRuntimeArtifact(Artifact):
    """An inference session with an explicit number of threads."""

    def __init__(self, signature: Signature, target: Target, threads: int, program: Any) -> None:
        import onnxruntime

        super().__init__(signature, target, threads)
        self._program = program
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            program.save(path, external_data=True)
            try:
                self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # its exceptions share no base class of their own
                raise GraphoptError(
                    "ONNX Runtime does not load the exported model", why=str(error), todo="use another backend"
                ) from error
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, tensors: list[Any]) -> list[Any]:
        as_torch = any(is_torch(tensor) for tensor in tensors)
        arrays = [tensor.detach().numpy() if as_torch else tensor for tensor in tensors]
        results = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        if not as_torch:
            return list(results)
        import torch

        return [torch.from_numpy(result) for result in results]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.onnx` into a new folder, for other programs; graphopt does not load it back as an artifact."""
        with write_whole(directory) as folder:
            folder.mkdir()
            self._program.save(folder / "model.onnx", external_data=True)


class OnnxRuntimeBackend(Backend):
    """Runs what torch.onnx can export."""

    name: ClassVar[str] = "onnxruntime"

    def supports(self, model: Model) -> list[Unsupported]:
        exported = _exported(model)
        return [exported] if isinstance(exported, Unsupported) else []

    def compile(
        self, model: Model, target: Target, *, threads: int | None = None, exact_float: bool = False
    ) -> Artifact:
        check_exact(type(self), exact_float)
        exported = _exported(model)
        if isinstance(exported, Unsupported):
            raise refuse(self.name, [exported])
        return OnnxRuntimeArtifact(model.signature, target, threads or target.cores, exported)


def _exported(model: Model) -> Any:
    """The ONNX program of a model, or why torch.onnx cannot make it."""
    import torch

    from graphopt.export import to_exported_program

    program = to_exported_program(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about opset conversions nobody asked for
            return torch.onnx.export(program, (), dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        return Unsupported("torch.onnx.export", "the graph", reason[0] if reason else type(error).__name__)
