"""Writing files so that nothing half-written is ever left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import UsageError

__all__ = ["write_whole"]


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the body writes there, a file or a folder, becomes `path` at the end.

    When the body fails, nothing is left and an older `path` stays as it was.

    Raises:
        UsageError: when the system cannot write there (no such folder, no permission, disk full).
    """
    final = Path(path)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise _cannot_write(final, error) from error
    try:
        yield scratch / final.name
        _move(scratch / final.name, final, scratch)
    except OSError as error:
        raise _cannot_write(final, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(made: Path, final: Path, scratch: Path) -> None:
    if final.is_dir():
        # A folder cannot be replaced in one step: the old one steps aside first.
        final.rename(scratch / "old")
    made.replace(final)


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"'{path}' cannot be written: {error.strerror or error}",
        todo="check that the folder exists, is writable and has room; nothing was left behind",
    )
