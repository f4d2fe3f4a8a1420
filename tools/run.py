"""`graphopt run`: feed arrays to a bundle or a model, and write what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.errors import UsageError
from graphopt.tools.console import emit_json, say, show_table, working
from graphopt.tools.sources import AsJson, Threads, check_output, is_bundle, read_model

if TYPE_CHECKING:
    from graphopt.backend import Artifact

__all__ = ["run"]


def run(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR|IN", help="A bundle, or a model as the other commands take.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.npz", help="Where the outputs go, by name.")],
    pairs: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="NAME=FILE.npy", help="An input; may be repeated.")
    ] = None,
    archives: Annotated[
        list[Path] | None, typer.Option("--inputs", metavar="FILE.npz", help="Several inputs by name; may be repeated.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="What runs a model.", show_default="reference")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run a model on arrays. A bundle is run as it was compiled and needs no torch."""
    from graphopt.tools.arrays import bind, read_named, require_plain, write_npz

    if output.suffix != ".npz":
        raise UsageError(f"'{output}' does not end in .npz")
    check_output(output, ours=None)
    arrays = read_named(pairs or (), archives or ())
    artifact = _artifact(source, backend, threads)
    require_plain(artifact.signature)
    inputs = bind(arrays, artifact.signature)
    with working(f"running {source}"):
        results = artifact.run(inputs)
    named = dict(zip((spec.name for spec in artifact.signature.tensor_outputs), results, strict=True))
    write_npz(output, named)
    rows = [(name, array.dtype.name, list(array.shape)) for name, array in named.items()]
    if as_json:
        emit_json(
            {
                "output": str(output),
                "outputs": [dict(zip(("name", "dtype", "shape"), row, strict=True)) for row in rows],
            }
        )
    else:
        show_table(("output", "dtype", "shape"), rows)
    say(f"wrote {output}")


def _artifact(source: str, backend: str | None, threads: int | None) -> Artifact:
    from graphopt.backend import build, get_backend, load_artifact

    if is_bundle(source):
        if backend is not None or threads is not None:
            raise UsageError(f"--backend and --threads were chosen when the bundle '{source}' was built")
        return load_artifact(source)
    get_backend(backend or "reference")
    model = read_model(source)
    with working(f"compiling {source}"):
        return build(model, backend=backend or "reference", threads=threads)
