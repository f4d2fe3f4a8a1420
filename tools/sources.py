"""What the commands share of their arguments: the model that goes in, the file that comes out, named sizes."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.errors import LoadError, UsageError
from graphopt.tools.console import working

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = [
    "AsJson",
    "BackendName",
    "PipelineText",
    "Source",
    "Threads",
    "check_output",
    "is_bundle",
    "parse_sizes",
    "read_model",
]


def _complete_pipeline(incomplete: str) -> list[str]:
    """Names of passes for the last step of a pipeline that is being typed."""
    from graphopt.registry import PRESETS, pass_names

    head, comma, last = incomplete.rpartition(",")
    return [f"{head}{comma}{name}" for name in (*PRESETS, *pass_names()) if name.startswith(last)]


Source = Annotated[
    str,
    typer.Argument(metavar="IN", help="A .onnx, .pt2 or .gopt file, or module:callable.", show_default=False),
]
_LARGE = 2**30
"""Bytes."""
PipelineText = Annotated[
    str,
    typer.Option("-p", "--pipeline", help="Passes in order.", autocompletion=_complete_pipeline),
]
BackendName = Annotated[str, typer.Option("--backend", help="What compiles and runs the model.")]


def _threads(number: int | None) -> int | None:
    """The option as it is, checked before anything is read."""
    if number is not None:
        from graphopt.backend import check_threads

        check_threads(number, where="--threads")
    return number


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", callback=_threads, help="Threads to run on.", show_default="the target's cores"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and errors as JSON to stderr.")]


def is_bundle(source: str) -> bool:
    """Whether a source is a folder that `graphopt build` writes, and not a model."""
    return Path(source).is_dir() and Path(source).suffix != ".gopt"


def read_model(source: str) -> Model:
    """Load a model, with progress. The weights of a large `.gopt` file stay on disk.

    Raises:
        LoadError, UnsupportedError: as `graphopt.load`.
    """
    with working(f"reading {source}"):
        from graphopt.frontends import load

        path = Path(source)
        large = path.suffix == ".gopt" and path.is_file() and path.stat().st_size >= _LARGE
        if large:
            _check_sums(path)
        return load(source, mapped=large)


def _check_sums(path: Path) -> None:
    """Notice damage to the parts of a zip file, which nothing does once they are mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        raise LoadError(f"'{path}' is no .gopt model", why=str(error)) from error
    if wrong is not None:
        raise LoadError(f"'{path}' is damaged", why=f"the checksum of {wrong} is another one")


def check_output(path: Path, *, ours: str | None) -> None:
    """Refuse a place that cannot be written, or must not be replaced, before any work is done for it.

    Args:
        ours: the file by which a folder is known as one that graphopt wrote and may replace; None for an output that
            is a file.

    Raises:
        UsageError: when the parent does not exist, or something else stands in the place.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder '{path.parent}' to write '{path.name}' to")
    if not path.is_dir():
        if ours is not None and path.exists() and path.suffix != ".gopt":
            raise UsageError(f"'{path}' is a file, a folder is to be written there")
        return
    if ours is None:
        raise UsageError(f"'{path}' is a folder, a file is to be written there")
    if any(path.iterdir()) and not (path / ours).is_file():
        raise UsageError(
            f"the folder '{path}' holds something else and would be replaced",
            why=f"it is not empty and has no {ours}",
            todo="name a new folder, or empty this one first",
        )


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """`["batch=8", "h=224"]` as a dict.

    Raises:
        UsageError: naming every text that is not NAME=NUMBER.
    """
    sizes: dict[str, int] = {}
    wrong = []
    for text in texts:
        name, mark, number = text.partition("=")
        if not (name and mark and number.isdecimal()):
            wrong.append(f"'{text}'")
        else:
            sizes[name] = int(number)
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: a size is written NAME=NUMBER, such as batch=8")
    return sizes
