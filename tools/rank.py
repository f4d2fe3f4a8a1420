"""`graphopt rank`: the ranks of layers, and how much of them the data makes use of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graphopt.errors import UsageError
from graphopt.files import write_whole
from graphopt.tools.console import counted, data, emit_json, say, show_table, working
from graphopt.tools.sources import AsJson, Source, check_output, read_model

__all__ = ["rank"]


def rank(
    source: Source,
    calib: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.npz", help="A batch of inputs by name; needed, may be repeated."),
    ] = None,
    energy: Annotated[
        float, typer.Option(metavar="PART", help="Of a layer's outputs, that utilised directions hold.")
    ] = 0.99,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Write a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the rank of every layer, its effective rank, and its utilised rank on calibration data.

    `low-rank{energy=0.99}` and `project-utilized` make use of what is not utilised.
    """
    if not calib:
        raise UsageError(
            "rank needs calibration data",
            why="what is utilised is what the layers make of them",
            todo='give a batch of inputs by name: --calib DATA.npz, written by numpy.savez("DATA.npz", NAME=ARRAY); '
            f"`graphopt info {source}` tells the names",
        )
    if plot is not None:
        if plot.suffix != ".svg":
            raise UsageError(f"'{plot}' cannot be drawn", todo="name a file that ends in .svg")
        check_output(plot, ours=None)
    with working("starting"):
        from graphopt.passes._rank_table import rank_rows
        from graphopt.tools.arrays import read_batch
    model = read_model(source)
    batches = [read_batch(path, model.signature) for path in calib]
    with working("running the model on the data"):
        rows, without = rank_rows(model, batches, energy=energy)
    if plot is not None:
        from graphopt.tools._rank_plot import rank_plot

        with write_whole(plot) as path:
            path.write_text(rank_plot(source, energy, rows), encoding="utf-8")
        say(f"wrote {plot}")
    if as_json:
        layers = [asdict(row) for row in rows]
        emit_json({"input": source, "energy": energy, "batches": len(batches), "layers": layers, "left_out": without})
        return
    shown = [
        (
            row.layer,
            row.operator,
            f"{row.outputs} x {row.inputs}" + (f" x {row.groups}" if row.groups > 1 else ""),
            row.rank,
            f"{row.effective:.1f}",
            f"{row.data_effective:.1f}",
            row.utilised,
            f"{100 * row.utilised / max(row.full, 1):.0f} %",
        )
        for row in rows
    ]
    columns = ("layer", "operator", "weight", "rank", "effective", "on data", "utilised", "of full")
    show_table(columns, shown, right=columns[3:])
    data(f"{counted(len(rows), 'layer')}; utilised directions hold {100 * energy:g} % of what a layer makes.")
    for name, why in without.items():
        data(f"left out: {name}: {why}")
