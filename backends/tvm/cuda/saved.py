"""Artifacts for a GPU on disk: as for a CPU, with the kernels' source and machine code (`kernels.cubin`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.backends.tvm.cuda.artifact import GpuArtifact, Weight
from graphopt.backends.tvm.cuda.runtime import gpu_runtime
from graphopt.backends.tvm.runtime import ffi
from graphopt.backends.tvm.saved import SCHEMA, versions, write_weights
from graphopt.errors import GraphoptError, LoadError
from graphopt.files import write_whole
from graphopt.manifest import digests_of, write_manifest
from graphopt.signature import Signature
from graphopt.target import Target

__all__ = ["load_from", "save"]

_CODE, _WEIGHTS, _SOURCE, _KERNELS = "model.so", "weights.bin", "kernels.cu", "kernels.cubin"
_FILES = (_CODE, _WEIGHTS, _SOURCE, _KERNELS)


def save(artifact: GpuArtifact, directory: str | os.PathLike[str]) -> None:
    """Write an artifact that was compiled in this process; the folder appears whole or not at all.

    Raises:
        UsageError: when the folder cannot be written.
        GraphoptError: for an artifact that was itself loaded from a folder.
    """
    if artifact.built is None:
        raise GraphoptError("this artifact was loaded from a folder", todo="copy that folder")
    with write_whole(directory) as folder:
        folder.mkdir()
        artifact.built.executable.export_library(str(folder / _CODE))
        (folder / _SOURCE).write_text(artifact.source, encoding="utf-8")
        (folder / _KERNELS).write_bytes(artifact.code)
        tensors = [_Bytes(*weight) for weight in artifact.weights]
        manifest = {
            "backend": "tvm",
            "schema": SCHEMA,
            "signature": artifact.signature.to_json(),
            "target": artifact.target.to_json(),
            "threads": artifact.threads,
            "exact_float": False,
            "versions": versions(),
            "weights": write_weights(folder / _WEIGHTS, tensors, lambda tensor: bytes(tensor.data)),
            **artifact.record,
            "sha256": digests_of(folder),
        }
        write_manifest(folder, manifest)


class _Bytes:
    """A weight as `write_weights` takes it."""

    def __init__(self, dtype: str, shape: tuple[int, ...], data: Any) -> None:
        self.dtype, self.shape, self.data = dtype, shape, data


def load_from(
    folder: Path,
    manifest: Mapping[str, Any],
    signature: Signature,
    target: Target,
    rows: list[tuple[str, tuple[int, ...], int]],
) -> GpuArtifact:
    """Read a saved artifact whose files have been checked; a GPU is needed only when it is called.

    Raises:
        LoadError: when the manifest does not list a file.
    """
    for name in _FILES:
        if name not in manifest["sha256"]:
            raise LoadError(f"the manifest of '{folder}' is damaged", why=f"it does not list {name}")
    weights = _map_weights(folder / _WEIGHTS, rows)
    source = (folder / _SOURCE).read_text(encoding="utf-8")
    code = (folder / _KERNELS).read_bytes()

    def library() -> Any:
        try:
            return gpu_runtime().load_module(str(folder / _CODE))
        except (RuntimeError, OSError) as error:
            raise LoadError(
                f"'{folder / _CODE}' does not load on this machine",
                why=str(error).strip().splitlines()[-1],
                todo="its host code is for x86-64 Linux; build the model for this machine",
            ) from error

    return GpuArtifact(signature, target, library, source, code, weights)


def _map_weights(path: Path, rows: list[tuple[str, tuple[int, ...], int]]) -> list[Weight]:
    """The bytes of each weight, mapped: they are read when they are copied to the GPU."""
    data: Any = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    weights: list[Weight] = []
    for dtype, shape, offset in rows:
        count = int(np.prod(shape)) * ffi().dtype(dtype).itemsize
        if offset + count > data.size:
            raise LoadError(f"'{path}' is too short", why=f"a weight ends at {offset + count} of {data.size} bytes")
        weights.append((dtype, shape, data[offset : offset + count]))
    return weights
