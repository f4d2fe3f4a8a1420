"""`graphopt tune`: measure what is best for the kernels of a model, and keep it for later builds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import UsageError
from graphopt.tools.console import counted, emit_json, say, show_table, working
from graphopt.tools.sources import AsJson, PipelineText, Threads, read_model

if TYPE_CHECKING:
    from graphopt.backends.tvm.tune.search import Progress
    from graphopt.backends.tvm.tune.tuning import Tuning
    from graphopt.model import Model
    from graphopt.target import Target

__all__ = ["Budget", "seconds_of", "tune", "tuned_model"]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """`10m`, `90s`, `1.5h` or a bare number of seconds.

    Raises:
        UsageError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None:
        raise UsageError(f"'{text}' is no length of time", todo="write 90s, 10m or 1h")
    return float(found[1]) * _UNITS[found[2]]


Budget = Annotated[str, typer.Option(metavar="TIME", help="How long to search: 90s, 10m, 1h.")]


def tune(
    source: Annotated[
        str | None, typer.Argument(metavar="IN", help="A .onnx, .pt2 or .gopt file, or module:callable.")
    ] = None,
    target: Annotated[str, typer.Option(help="A CPU of `graphopt targets`, or a JSON file.")] = "cpu",
    budget: Budget = "10m",
    database: Annotated[
        Path | None,
        typer.Option("--db", metavar="DIR", help="Where measurements are kept.", show_default="the user's cache"),
    ] = None,
    pipeline: PipelineText = "exact",
    threads: Threads = None,
    exact_float: Annotated[
        bool, typer.Option("--exact-float", help="Use no algorithm that rounds more than the plain one.")
    ] = False,
    tracker: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure on the machines that this tracker knows.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="NAME", help="Which of them, as `rpc-server --key` says.")] = None,
    merge: Annotated[
        list[Path] | None, typer.Option("--merge", metavar="DIR", help="First add what was measured elsewhere.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search for faster kernels by measuring; `graphopt build --tuned DIR` uses what was found.

    Ctrl-C ends the search early and keeps what was found so far. A later search goes on where this one ended.
    """
    from graphopt.measure import cache_folder
    from graphopt.target import Target

    seconds, place = seconds_of(budget), database or cache_folder()
    if (tracker is None) != (key is None):
        raise UsageError("--tracker and --key go together", todo="name both, or neither to measure on this machine")
    where = Target.parse(target)
    added = _merged(place, merge or (), where, threads)
    if source is None:
        if not merge:
            raise UsageError("there is nothing to do", todo="name a model (IN), or a database to --merge")
        return
    with working("starting"):
        from graphopt.tools.pipelines import apply, parse

    model, _ = apply(read_model(source), parse(pipeline))
    fleet = (tracker, key) if tracker is not None and key is not None else None
    found = tuned_model(model, where, place, seconds, threads=threads, exact_float=exact_float, fleet=fleet)
    facts = {"input": source, "target": target, "database": str(place), "merged": added, **_facts(found)}
    if as_json:
        emit_json(facts)
    else:
        show_table(("", ""), [(name, "" if value is None else value) for name, value in facts.items()])


def tuned_model(
    model: Model,
    where: Target,
    place: Path,
    seconds: float,
    *,
    threads: int | None,
    exact_float: bool,
    fleet: tuple[str, str] | None = None,
) -> Tuning:
    """Tune with a progress bar, and say what is not as it should be.

    Args:
        fleet: a tracker, and the key of the machines there to measure on.
    """
    with working("starting"):
        from graphopt.backends.tvm.tune.fleet import FleetMeasurer
        from graphopt.backends.tvm.tune.tuning import tune as tuned

    options: dict[str, Any] = {"threads": threads, "exact_float": exact_float}
    if fleet is not None:
        options["measurer"] = FleetMeasurer(*fleet)
    with _bar(seconds) as report:
        found = tuned(model, where, database=place, budget=seconds, report=report, **options)
    if found.interrupted:
        say("interrupted: what was measured so far is kept")
    if found.ignored:
        say(found.ignored)
    for reason in found.tasks.left:
        say(f"not tuned: {reason}")
    return found


def _merged(place: Path, others: Any, where: Target, threads: int | None) -> int:
    """Add other databases; returns how many measurements came."""
    if not others:
        return 0
    from graphopt.backends.tvm.tune.database import Database, Environment

    own = Database(place, Environment.of(where, threads or where.cores, exact=False))
    try:
        added = sum(own.merge(other) for other in others)
    finally:
        own.close()
    say(f"{counted(added, 'measurement')} added")
    return added


def _facts(found: Tuning) -> dict[str, Any]:
    outcome = found.outcome
    facts: dict[str, Any] = {
        "tasks": len(found.tasks.known),
        "candidates": found.candidates,
        "failed": found.failed,
        "interrupted": found.interrupted,
        "tuned_over_untuned": None if outcome is None else round(outcome.ratio, 4),
    }
    if outcome is not None:
        kept = len(outcome.kernels) + len(outcome.algorithms)
        facts |= {"kept": kept, "dropped": len(outcome.dropped)}
    return facts


@contextmanager
def _bar(seconds: float) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time that is left and the latency as it falls; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        line = bar.add_task("extracting tasks", total=seconds)
        yield lambda progress: bar.update(line, completed=seconds - progress.left, description=_line(progress))


def _line(progress: Progress) -> str:
    tried = f"{counted(progress.candidates, 'candidate')}, {progress.failed} failed"
    if progress.before is None or progress.now is None:
        return f"first look: {progress.task} ({tried})"
    before, now = progress.before * 1e3, progress.now * 1e3
    return f"{before:.2f} -> {now:.2f} ms ({now / before - 1:+.1%}; {tried})"
