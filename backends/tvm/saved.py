"""Artifacts on disk: `model.so` (code), `weights.bin` (the weights, one after the other) and `manifest.json`.

The manifest holds the schema version, signature, target, threads, whether the code is exact, versions, where each
weight lies, and the SHA-256 of the other files, which are checked before any of them is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt.backend import Artifact, check_threads, read_manifest
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.runtime import ffi
from graphopt.errors import GraphoptError, LoadError, UsageError
from graphopt.files import write_whole
from graphopt.signature import Signature
from graphopt.target import Target, why_not_here

__all__ = ["SCHEMA", "check_file", "digest", "load", "load_from", "save", "versions", "weight_row", "write_weights"]

SCHEMA = 2
"""Version of the format; raised whenever an older reader would misread a newer folder."""

_CODE, _WEIGHTS = "model.so", "weights.bin"
_ALIGNMENT = 64
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")


def save(artifact: TvmArtifact, directory: str | os.PathLike[str]) -> None:
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
        weights = write_weights(folder / _WEIGHTS, artifact.weights, _bytes)
        manifest = {
            "backend": "tvm",
            "schema": SCHEMA,
            "signature": artifact.signature.to_json(),
            "target": artifact.target.to_json(),
            "threads": artifact.threads,
            "exact_float": artifact.exact_float,
            "versions": versions(),
            "weights": weights,
            "sha256": {name: digest(folder / name) for name in (_CODE, _WEIGHTS)},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load(directory: str | os.PathLike[str]) -> Artifact:
    """Read a saved artifact; weights are mapped, not read. Imports neither torch nor the compiler.

    Raises:
        LoadError: when a file is missing or altered, or the folder was written in another format.
    """
    folder = Path(directory)
    return load_from(folder, read_manifest(folder))


def load_from(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    """Read a saved artifact whose manifest has been read already.

    Raises:
        LoadError: when a file is missing or altered, or the folder was written in another format.
    """
    if manifest.get("schema") != SCHEMA:
        raise LoadError(
            f"'{folder}' has format {manifest.get('schema')}, this version reads format {SCHEMA}",
            todo="build the model again with this version of graphopt",
        )
    try:
        digests = dict(manifest["sha256"])
        signature = Signature.from_json(manifest["signature"])
        target = Target.from_json(manifest["target"])
        threads, rows = int(manifest["threads"]), [weight_row(row) for row in manifest["weights"]]
        exact = bool(manifest.get("exact_float", False))
        check_threads(threads)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise LoadError(f"the manifest of '{folder}' is damaged", why=f"{type(error).__name__}: {error}") from error
    if target.kind == "cuda":
        from graphopt.backends.tvm.cuda.saved import load_from as load_for_gpu

        return load_for_gpu(folder, manifest, signature, target, rows)
    for name in (_CODE, _WEIGHTS):
        check_file(folder / name, digests.get(name))
    foreign = why_not_here(target)
    if foreign is not None:
        raise LoadError(
            f"'{folder}' is code for {target.arch} {target.cpu}, which this machine cannot run",
            why=foreign,
            todo="run it on such a machine, or build the model for this one: --target cpu",
        )
    weights = _map_weights(folder / _WEIGHTS, rows)
    try:
        module = ffi().load_module(str(folder / _CODE))
    except (RuntimeError, OSError) as error:
        raise LoadError(
            f"'{folder / _CODE}' does not load on this machine",
            why=str(error).strip().splitlines()[-1],
            todo=f"it was built for {target.arch} {target.cpu}; build the model for this machine",
        ) from error
    return TvmArtifact(signature, target, threads, module, weights, exact_float=exact)


def weight_row(row: Any) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and offset of a weight, as the manifest says."""
    return str(row["dtype"]), tuple(int(size) for size in row["shape"]), int(row["offset"])


def check_file(path: Path, expected: str | None) -> None:
    """Refuse a file that is missing or altered.

    Raises:
        LoadError: naming the file.
    """
    if not path.is_file():
        raise LoadError(f"'{path}' is missing", todo="copy the whole folder, or build the model again")
    if digest(path) != expected:
        raise LoadError(
            f"'{path}' is not the file that was saved",
            why="its SHA-256 differs from the manifest's",
            todo="copy the folder again, or build the model again",
        )


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of what made an artifact."""
    return {"graphopt": graphopt.__version__} | {name: version(name) for name in _PACKAGES}


def write_weights(path: Path, weights: Iterable[Any], bytes_of: Callable[[Any], bytes]) -> list[dict[str, Any]]:
    """Write weights one after the other; returns dtype, shape and offset of each."""
    rows = []
    with path.open("wb") as file:
        for weight in weights:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            rows.append({"dtype": str(weight.dtype), "shape": [int(n) for n in weight.shape], "offset": file.tell()})
            file.write(bytes_of(weight))
    return rows


def _bytes(weight: Any) -> bytes:
    array = np.from_dlpack(weight)
    return array.tobytes()


def _map_weights(path: Path, rows: list[tuple[str, tuple[int, ...], int]]) -> list[Any]:
    """TVM tensors over the mapped file. Its pages are private to the process, so that nothing can change the file."""
    if not path.stat().st_size:
        return [ffi().from_dlpack(np.empty(shape, dtype)) for dtype, shape, _ in rows]
    data = np.memmap(path, np.uint8, mode="c")
    weights = []
    for dtype, shape, offset in rows:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if offset + count > data.size:
            raise LoadError(f"'{path}' is too short", why=f"a weight ends at {offset + count} of {data.size} bytes")
        weights.append(ffi().from_dlpack(data[offset : offset + count].view(dtype).reshape(shape)))
    return weights
