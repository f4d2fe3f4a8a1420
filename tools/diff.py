"""`graphopt diff`: what changed between two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from graphopt.errors import GraphoptError, UsageError
from graphopt.tools._diff_page import check_page_output, write_page
from graphopt.tools._escape import harmless
from graphopt.tools.console import data, emit_json, working
from graphopt.tools.sources import AsJson, BackendName

if TYPE_CHECKING:
    from graphopt.diff import GraphDiff

__all__ = ["DiffCommand", "diff"]

Part = Literal["ops", "weights", "shapes", "cost"]


class DiffCommand(TyperCommand):
    """The command, whose `--run` may be followed by a file of inputs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `--run DATA.npz` as `--run --inputs DATA.npz`."""
        words: list[str] = []
        for word in args:
            if words and words[-1] == "--run" and word.endswith(".npz"):
                words.append("--inputs")
            words.append(word)
        return super().parse_args(ctx, words)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A .onnx, .pt2 or .gopt file, or module:callable.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, of any format.")],
    context: Annotated[int, typer.Option(metavar="N", min=0, help="Unchanged nodes to show around a region.")] = 0,
    stat: Annotated[bool, typer.Option("--stat", help="Only count the differences in each module.")] = False,
    only: Annotated[Part | None, typer.Option(help="Show this part alone.")] = None,
    run: Annotated[
        bool,
        typer.Option("--run", help="Run both on the same seeded inputs, or on those of --run DATA.npz, and compare."),
    ] = False,
    inputs: Annotated[
        Path | None, typer.Option(metavar="DATA.npz", help="Inputs by the names of the first model; implies --run.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Compile both with --backend and time them.")] = False,
    backend: BackendName = "tvm",
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="weights, attributes, moved, module=PATTERN, ...; may be repeated."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Relative difference up to which numbers count as equal.")] = 0.0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown for a code review.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write a page with both graphs side by side too.")
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="With --json: the nodes of both graphs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models: structure, weights, costs and, with --run, numbers.

    Nodes are matched by structure and weights, not by name. Exit code 0: no differences, 1: some, 2: trouble.
    """
    try:
        if sum((markdown, as_json, stat or only is not None)) > 1:
            raise UsageError("--json, --markdown and --stat or --only are different outputs", todo="choose one")
        if html is not None:
            check_page_output(html)
        found = _compare(a, b, run, inputs, backend if latency else None, ignore or [], tolerance)
        if html is not None:
            write_page(html, found.to_html)
    except GraphoptError as error:
        raise harmless(error) from error
    if as_json:
        emit_json(found.to_json(graph=graph))
    elif markdown:
        from graphopt.tools._diff_markdown import as_markdown

        data(as_markdown(found, context=context))
    elif stat:
        from graphopt.tools._diff_text import show_stat

        show_stat(found)
    else:
        from graphopt.tools._diff_text import show_diff

        show_diff(found, context=context, only=only)
    if found:
        raise typer.Exit(1)


def _compare(
    a: str, b: str, run: bool, inputs: Path | None, latency: str | None, ignore: list[str], tolerance: float
) -> GraphDiff:
    from graphopt.tools.arrays import read_batch

    with working("starting") as tell:
        import graphopt as go
        from graphopt.backend import get_backend

        if latency is not None:
            get_backend(latency)  # an unknown one is refused before anything is read
        tell(f"reading {a}")
        first = go.load(a, mapped=True)
        tell(f"reading {b}")
        second = go.load(b, mapped=True)
        tensors = read_batch(inputs, first.signature) if inputs is not None else None
        tell("comparing")
        return go.diff(
            first,
            second,
            run=run,
            inputs=tensors,
            latency=latency,
            ignore=ignore,
            tolerance=tolerance,
            names=(a, b),
        )
