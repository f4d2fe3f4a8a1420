"""Bundles: artifacts on disk, with all that running them needs.

    model.so         the code, and the weights after it where they are small
    weights.bin      the weights, one after the other, where they are large
    lib/             TVM's runtime libraries for the target's architecture
    graphopt_run     a program that verifies and runs the bundle without Python
    src/             its sources and CMakeLists.txt, for programs of one's own
    manifest.json    schema version, signature, target, what the processor needs, threads, versions, history, checks,
                     where each weight lies, and the SHA-256 of every file above
    manifest.sha256  the SHA-256 of the manifest

Every file is checked before any is used. Weights are mapped into memory, not read. The same model, target and versions
give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt.backend import Artifact, check_threads
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.bundle import toolchain, wheels
from graphopt.backends.tvm.runtime import ffi
from graphopt.errors import GraphoptError, LoadError, UsageError
from graphopt.files import write_whole
from graphopt.manifest import check_files, digests_of, read_manifest, write_manifest
from graphopt.signature import Signature
from graphopt.target import Target, why_not_here

__all__ = ["SCHEMA", "load", "load_from", "save", "versions", "weight_row", "write_weights"]

SCHEMA = 4
"""Version of the format; raised whenever an older reader would misread a newer folder."""

_CODE, _WEIGHTS = "model.so", "weights.bin"
_ALIGNMENT = 64
_MOST_WITHIN = 16 << 20
"""Bytes of weights that become part of model.so; more lie in a file beside it."""


def save(artifact: TvmArtifact, directory: str | os.PathLike[str]) -> None:
    """Write an artifact that was compiled in this process; the folder appears whole or not at all.

    Raises:
        UsageError: when the folder cannot be written, or a compiler or the runtime of the target is missing.
        GraphoptError: for an artifact that was itself loaded from a folder.
    """
    if artifact.built is None:
        raise GraphoptError("this artifact was loaded from a folder", todo="copy that folder")
    arch = artifact.target.arch
    with write_whole(directory) as folder:
        folder.mkdir()
        toolchain.lay_out(folder / "lib", wheels.libraries(arch))
        toolchain.lay_out(folder / "src", toolchain.sources())
        (folder / toolchain.PROGRAM).write_bytes(toolchain.program(arch))
        (folder / toolchain.PROGRAM).chmod(0o755)
        toolchain.link(artifact.built.executable, folder / _CODE, arch)
        within = sum(_size(weight) for weight in artifact.weights) <= _MOST_WITHIN
        name = _CODE if within else _WEIGHTS
        manifest = {
            "backend": "tvm",
            "schema": SCHEMA,
            "signature": artifact.signature.to_json(),
            "target": artifact.target.to_json(),
            "needs": sorted(artifact.target.needs),
            "threads": artifact.threads,
            "exact_float": artifact.exact_float,
            "versions": versions(),
            **artifact.record,
            "weights_file": name,
            "weights": write_weights(folder / name, artifact.weights, _bytes),
            "sha256": digests_of(folder),
        }
        write_manifest(folder, manifest)


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
        LoadError: when a file is missing or altered, the folder was written in another format or for another version of
            TVM, or this machine cannot run the code.
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
        exact, weights_file = bool(manifest["exact_float"]), str(manifest.get("weights_file", _WEIGHTS))
        made_by = dict(manifest["versions"])
        check_threads(threads)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise LoadError(f"the manifest of '{folder}' is damaged", why=f"{type(error).__name__}: {error}") from error
    _require_listed(folder, digests, (_CODE, weights_file))
    _require_versions(folder, made_by)
    check_files(folder, digests)
    if target.kind == "cuda":
        from graphopt.backends.tvm.cuda.saved import load_from as load_for_gpu

        return load_for_gpu(folder, manifest, signature, target, rows)
    foreign = why_not_here(target)
    if foreign is not None:
        raise LoadError(
            f"'{folder}' is code for {target.arch} {target.cpu}, which this machine cannot run",
            why=foreign,
            todo="run it on such a machine, or build the model for this one: --target cpu",
        )
    weights = _map_weights(folder / weights_file, rows)
    try:
        module = ffi().load_module(str(folder / _CODE))
    except (RuntimeError, OSError) as error:
        raise LoadError(
            f"'{folder / _CODE}' does not load on this machine",
            why=str(error).strip().splitlines()[-1],
            todo=f"it was built for {target.arch} {target.cpu}; build the model for this machine",
        ) from error
    return TvmArtifact(signature, target, threads, module, weights, exact_float=exact)


def _require_listed(folder: Path, digests: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in digests:
            raise LoadError(f"the manifest of '{folder}' is damaged", why=f"it does not list {name}")


def _require_versions(folder: Path, made_by: Mapping[str, Any]) -> None:
    """The code and the runtime that is installed here have to be of one version."""
    for package, here in versions().items():
        if package in wheels.PACKAGES and made_by.get(package) != here:
            raise LoadError(
                f"'{folder}' was made with {package} {made_by.get(package)}, here is {here}",
                todo="install that version, build the model again, or run the bundle's own program graphopt_run",
            )


def weight_row(row: Any) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and offset of a weight, as the manifest says."""
    return str(row["dtype"]), tuple(int(size) for size in row["shape"]), int(row["offset"])


def versions() -> dict[str, str]:
    """Versions of what made an artifact."""
    return {"graphopt": graphopt.__version__} | {name: version(name) for name in wheels.PACKAGES}


def write_weights(path: Path, weights: Iterable[Any], bytes_of: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Write weights one after the other at the end of a file; returns dtype, shape and offset of each."""
    rows = []
    with path.open("ab") as file:
        for weight in weights:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            rows.append({"dtype": str(weight.dtype), "shape": [int(n) for n in weight.shape], "offset": file.tell()})
            file.write(bytes_of(weight))
    return rows


def _size(weight: Any) -> int:
    return int(np.from_dlpack(weight).nbytes)


def _bytes(weight: Any) -> Any:
    """The memory of a weight, not a copy of it."""
    return np.ascontiguousarray(np.from_dlpack(weight)).reshape(-1).view(np.uint8).data


def _map_weights(path: Path, rows: list[tuple[str, tuple[int, ...], int]]) -> list[Any]:
    """TVM tensors over the mapped file. Its pages are private to the process, so that nothing can change the file."""
    if not path.stat().st_size:
        return [ffi().from_dlpack(np.empty(shape, dtype)) for dtype, shape, _ in rows]
    data = np.memmap(path, np.uint8, mode="c")
    weights, end = [], 0
    for dtype, shape, offset in rows:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if offset + count > data.size:
            raise LoadError(f"'{path}' is too short", why=f"a weight ends at {offset + count} of {data.size} bytes")
        if end and offset != end + -end % _ALIGNMENT:
            raise _out_of_order(path)
        end = offset + count
        weights.append(ffi().from_dlpack(data[offset : offset + count].view(dtype).reshape(shape)))
    if rows and end != data.size:
        raise _out_of_order(path)
    return weights


def _out_of_order(path: Path) -> LoadError:
    return LoadError(f"the manifest beside '{path}' is damaged", why="weights do not lie one after the other")
