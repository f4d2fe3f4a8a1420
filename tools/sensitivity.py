"""`graphopt sensitivity`: what is lost when a part of one group of units goes alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.errors import UsageError
from graphopt.files import write_whole
from graphopt.tools.console import counted, data, emit_json, say, working
from graphopt.tools.sources import AsJson, Source, check_output, read_model

if TYPE_CHECKING:
    from graphopt.passes._sensitivity import Row

__all__ = ["sensitivity"]

_COLOURS = ((0.1, "red"), (0.01, "yellow"), (0.0, "green"))
"""The colour of an error from each size on."""

_UNLIMITED = 100_000
"""Width of a table that goes to a file or a pipe."""


def sensitivity(
    source: Source,
    calib: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.npz", help="A batch of inputs by name; needed, may be repeated."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with a heat map.")] = None,
    importance: Annotated[
        str, typer.Option(metavar="NAME", help="What sorts the units, as for prune-channels.")
    ] = "taylor",
    fractions: Annotated[
        str, typer.Option(metavar="LIST", help="The parts of a group to remove.")
    ] = "0.1,0.25,0.5,0.75,0.9",
    refit: Annotated[bool, typer.Option(help="Show also what is lost after refitting what reads the units.")] = True,
    only: Annotated[list[str] | None, typer.Option(metavar="GROUP", help="A group; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is lost when the least important units of one group are removed, for every group alone.

    What is lost is the relative error of the outputs on the calibration data.
    """
    if not calib:
        raise UsageError(
            "sensitivity needs calibration data",
            why="what is lost is the error of the outputs on them",
            todo='give a batch of inputs by name: --calib DATA.npz, written by numpy.savez("DATA.npz", NAME=ARRAY); '
            f"`graphopt info {source}` tells the names",
        )
    if html is not None:
        check_output(html, ours=None)
    asked = _numbers(fractions)
    with working("starting"):
        from graphopt.passes._sensitivity import check_options, sensitivity
        from graphopt.tools.arrays import read_batch

    asked = check_options(asked, importance)
    model = read_model(source)
    batches = [read_batch(path, model.signature) for path in calib]
    with working("following every axis") as tell:
        rows = sensitivity(
            model, batches, importance=importance, fractions=asked, refit=refit, only=only or (), tell=tell
        )
    if html is not None:
        from graphopt.tools._heat_map import heat_map

        with write_whole(html) as path:
            path.write_text(heat_map(source, importance, rows), encoding="utf-8")
        say(f"wrote {html}")
    if as_json:
        found = {"input": source, "importance": importance, "batches": len(batches)}
        emit_json({**found, "rows": [asdict(row) for row in rows]})
    else:
        _show(rows, refit=refit)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(
            f"'{text}' is no list of fractions", todo="write numbers with commas between, such as 0.25,0.5"
        ) from error


def _show(rows: Sequence[Row], *, refit: bool) -> None:
    if not rows:
        data("0 groups; `graphopt groups` tells what stays and why.")
        return
    _table("error when cut", rows, [row.error for row in rows])
    if refit:
        _table("error when refitted and cut", rows, [row.refitted for row in rows])
    data(f"{counted(len({row.group for row in rows}), 'group')}; errors are relative to the outputs.")
    if any(not row.removed for row in rows):
        data("-: the fraction is less than a unit.")
    for row in rows:
        if row.reason:
            data(f"?: {row.label} at {100 * row.fraction:g} %: {row.reason}")


def _table(title: str, rows: Sequence[Row], errors: Sequence[float | None]) -> None:
    """One line for each family, one column for each fraction; coloured on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("group", overflow="fold")
    fractions = dict.fromkeys(row.fraction for row in rows)
    for column in ("units", *(f"{100 * fraction:g} %" for fraction in fractions)):
        table.add_column(column, justify="right")
    for _, pairs in groupby(zip(rows, errors, strict=True), lambda pair: pair[0].label):
        line = list(pairs)
        cells = [Text(*_cell(row, error)) for row, error in line]
        table.add_row(Text(line[0][0].label), Text(str(line[0][0].units)), *cells)
    width = None if sys.stdout.isatty() else _UNLIMITED
    Console(file=sys.stdout, width=width, highlight=False, emoji=False).print(table)


def _cell(row: Row, error: float | None) -> tuple[str, str]:
    """What stands in a cell, and its colour."""
    if error is None:
        return "?", "bold"
    if not row.removed:
        return "-", ""
    return f"{error:.2g}", next(colour for size, colour in _COLOURS if error >= size)
