"""The manifest of a saved artifact, `manifest.json`, and its seal, `manifest.sha256`.

The manifest holds the SHA-256 of every other file of the folder; the seal holds the manifest's own, as the program
`sha256sum` writes it. Together any changed byte is found before a file is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from graphopt.errors import LoadError

__all__ = ["MANIFEST", "SEAL", "check_files", "digest", "digests_of", "read_manifest", "write_manifest"]

MANIFEST, SEAL = "manifest.json", "manifest.sha256"

_COPY_AGAIN = "copy the folder again, or build the model again"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest and its seal."""
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / SEAL).write_bytes(_seal_of(content))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved artifact.

    Raises:
        LoadError: when there is none, or it is not the one that was saved.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"'{folder}' is not a saved artifact", where=str(path), why=str(error)) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("backend"), str):
        raise LoadError(f"'{folder}' is not a saved artifact", where=str(path), why="it names no backend")
    try:
        seal = (folder / SEAL).read_bytes()
    except OSError as error:
        why = "the folder was altered, or written by an older version of graphopt, which made none"
        raise LoadError(f"'{folder / SEAL}' is missing", why=why, todo=_COPY_AGAIN) from error
    if seal != _seal_of(content):
        raise LoadError(
            f"'{path}' is not the file that was saved", why=f"its SHA-256 differs from {SEAL}", todo=_COPY_AGAIN
        )
    return manifest


def _seal_of(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path with slashes, sorted."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: digest(folder / name) for name in files}


def check_files(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a folder in which a file is missing or altered.

    Args:
        expected: SHA-256 by path.

    Raises:
        LoadError: naming the file.
    """
    for name, sum_ in expected.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\0" in name:
            raise LoadError(f"the manifest of '{folder}' is damaged", why=f"it lists the file '{name}'")
        path = folder / name
        if not path.is_file():
            raise LoadError(f"'{path}' is missing", todo="copy the whole folder, or build the model again")
        if digest(path) != sum_:
            raise LoadError(
                f"'{path}' is not the file that was saved",
                why="its SHA-256 differs from the manifest's",
                todo=_COPY_AGAIN,
            )


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
