"""`graphopt repro`: run again what a failed pass has left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.errors import PassFailed
from graphopt.tools.console import counted, data, emit_json, say, working
from graphopt.tools.sources import AsJson

__all__ = ["repro"]


def repro(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `graphopt opt --repro` wrote.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Run the pipeline of a reproducer again. Ends with its error, or tells that no pass fails any more."""
    with working(f"reading {folder}"):
        from graphopt.repro import read_reproducer, versions
        from graphopt.tools.pipelines import apply, parse, report_to_json

        found = read_reproducer(folder)
    here = versions()
    others = [f"{name} {version}" for name, version in found.versions.items() if here.get(name) != version]
    if others and not as_json:
        say(f"it was written with {', '.join(others)}")
    try:
        _, reports = apply(found.model, parse(found.pipeline), check=found.check, limit=found.limit)
    except PassFailed as error:
        raise _compared(error, found.error) from error
    if as_json:
        plain = {"reproducer": str(folder), "pipeline": found.pipeline, "recorded": found.error}
        emit_json(plain | {"versions": dict(found.versions), "reports": [report_to_json(r) for r in reports]})
        return
    data(f"{found.pipeline}: {counted(len(reports), 'run')} of passes, and none fails")
    data(f"it was: {found.error}")


def _compared(error: PassFailed, recorded: str) -> PassFailed:
    """The error of this run, with the one that the reproducer was written for where that was another."""
    if recorded in error.what:
        return error
    why = f"when the reproducer was written it was: {recorded}"
    return PassFailed(error.what, where=error.where, why=f"{error.why}; {why}" if error.why else why, todo=error.todo)
