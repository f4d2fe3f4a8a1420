"""`graphopt search`: try pipelines, measure what each makes of a model, and keep the best."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import UsageError
from graphopt.files import write_whole
from graphopt.frontends import FORMATS
from graphopt.tools.console import counted, data, emit_json, say, show_table, working
from graphopt.tools.sources import AsJson, BackendName, Source, Threads, check_output, read_model

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.search import Result, Trial
    from graphopt.search.loop import Progress

__all__ = ["parse_time", "search"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def search(
    source: Source,
    target: Annotated[str, typer.Option(help="A preset of `graphopt targets` that runs here, or a JSON file.")] = "cpu",
    calib: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.npz", help="A batch of inputs by name; needed, may be repeated."),
    ] = None,
    valid: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.npz", help="A batch to measure losses on, in the place of --calib's; repeatable."),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="A loss of your own: of a model, the less the better.")
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LIMIT", help="A limit for latency, size or loss, such as latency=0.5; repeatable."),
    ] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is tried.", show_default="all that say what to try of them")
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", help="Pipelines in the study, those of before included.")] = 50,
    time: Annotated[
        str | None, typer.Option(metavar="10m", help="Begin no trial after this time: 90s, 10m, 2h.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Keep trials, and go on: sqlite:///study.db, or a server.")
    ] = None,
    study: Annotated[str, typer.Option(metavar="NAME", help="The study in the storage.")] = "search",
    seed: Annotated[int, typer.Option(min=0, help="Of what is tried.")] = 0,
    threads: Threads = None,
    backend: BackendName = "tvm",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the frontier.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help=f"Where the best model goes: {', '.join(FORMATS)}.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell every trial to stderr.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search over passes, their order and their options; latencies are measured on compiled code.

    With a goal the best pipeline within it is run once more, verified and written; without one the whole frontier of
    latency, size and loss is shown.
    """
    seconds, goals = parse_time(time) if time else None, _goals(goal or [])
    _check_outputs(output, plot, goals)
    with working("starting"):
        from graphopt.search import GoalMissed, check_request
        from graphopt.search import search as searched
        from graphopt.tools.arrays import read_batch

        check_request(passes, goals, target, trials)
    if not calib:
        raise UsageError(
            "search needs calibration data",
            why="passes calibrate with them, and losses are measured on them",
            todo='give a batch of inputs by name: --calib DATA.npz, written by numpy.savez("DATA.npz", NAME=ARRAY); '
            f"`graphopt info {source}` tells the names",
        )
    own = _function(evaluate) if evaluate else None
    model = read_model(source)
    batches = [read_batch(path, model.signature) for path in calib]
    judged = [read_batch(path, model.signature) for path in valid] if valid else None
    if storage is None:
        say("nothing is kept: --storage sqlite:///study.db would keep the trials, to go on with later")
    try:
        with _shown(trials, verbose) as tell:
            result = searched(
                model, target, calib=batches, valid=judged, evaluate=own, goals=goals, passes=passes, trials=trials,
                seconds=seconds, storage=storage, study=study, seed=seed, threads=threads, backend=backend, tell=tell,
            )  # fmt: skip
    except GoalMissed as missed:
        _write(source, missed.result, plot, None)
        if not as_json:
            _show(missed.result)
        raise
    _write(source, result, plot, output)
    if as_json:
        asked = {"input": source, "target": target, "threads": threads, "backend": backend, "seed": seed}
        emit_json(asked | {"output": output and str(output), **result.to_json()})
    else:
        _show(result)


def parse_time(text: str) -> float:
    """`90s`, `10m`, `1.5h` in seconds; a number alone is one of seconds.

    Raises:
        UsageError: for what is no time above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if seconds <= 0:
        raise UsageError(f"'{text}' is no time", todo="write a number with a unit, such as 90s, 10m or 2h")
    return seconds


def _goals(texts: list[str]) -> dict[str, float]:
    goals: dict[str, float] = {}
    for part in (part for text in texts for part in text.split(",")):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            goals[name] = float(number)
        except ValueError as error:
            raise UsageError(
                f"'{part}' is no goal", todo="write NAME=LIMIT, such as latency=0.5 for half of the latency"
            ) from error
    return goals


def _check_outputs(output: Path | None, plot: Path | None, goals: dict[str, float]) -> None:
    if output is not None:
        if output.suffix not in FORMATS:
            raise UsageError(f"'{output}' has none of the suffixes {', '.join(FORMATS)}")
        if not goals:
            raise UsageError(
                f"there is no single best result to write to '{output}' without a goal",
                todo="give one, such as --goal latency=0.5, or leave -o out and run a pipeline of the frontier: "
                "graphopt opt IN -p PIPELINE -o OUT",
            )
        check_output(output, ours="model.json" if output.suffix == ".gopt" else None)
    if plot is not None:
        if plot.suffix != ".svg":
            raise UsageError(f"'{plot}' cannot be drawn", todo="name a file that ends in .svg")
        check_output(plot, ours=None)


def _function(text: str) -> Callable[[Model], float]:
    module, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Callable[[Model], float] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as failure:
        raise UsageError(
            f"there is no function '{text}'",
            why=str(failure),
            todo="give MODULE:FUNCTION, which says of a model what it loses",
        ) from failure
    finally:
        sys.path.pop(0)
    return found


@contextmanager
def _shown(trials: int, verbose: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr with the best so far, if that is a terminal; a line for every trial, if asked for."""
    if not sys.stderr.isatty():
        with working("searching"):
            yield lambda progress: _tell(progress) if verbose else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False, emoji=False), transient=True) as bar:
        task = bar.add_task("the original", total=trials)

        def tell(progress: Any) -> None:
            best = progress.best
            text = f"best {_numbers(best)}: {best.pipeline}" if best else "searching"
            bar.update(task, completed=progress.done, description=text)
            if verbose:
                _tell(progress)

        with redirect_stdout(sys.stderr):  # what a user's function prints is no data
            yield tell


def _tell(progress: Progress) -> None:
    last = progress.last
    if last is not None:
        say(f"{progress.done}/{progress.wanted} trial {last.number}: {_outcome(last)}: {last.pipeline}")


def _outcome(trial: Trial) -> str:
    return _numbers(trial) if trial.found else f"{trial.state}: {trial.reason or 'its process died'}"


def _numbers(trial: Trial) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in trial.measures.items())


def _write(source: str, result: Result, plot: Path | None, output: Path | None) -> None:
    if plot is not None:
        from graphopt.tools._frontier_plot import frontier_plot

        with write_whole(plot) as path:
            path.write_text(frontier_plot(source, result), encoding="utf-8")
        say(f"wrote {plot}")
    if output is not None and result.model is not None:
        with working(f"writing {output}"):
            result.model.save(output)
        say(f"wrote {output}")


def _show(result: Result) -> None:
    columns = ("trial", "latency", "size", "loss")
    rows = [
        (trial.number, *(f"{value:.4g}" for value in trial.measures.values()), trial.pipeline)
        for trial in result.frontier
    ]
    if rows:
        show_table(
            (*columns, "pipeline"), rows, title="Frontier; latency and size are parts of the original's", right=columns
        )
    states = Counter(trial.state for trial in result.trials)
    told = ", ".join(f"{number} {state}" for state, number in states.items())
    data(f"{counted(len(result.trials), 'trial')}{f' ({told})' if told else ''}: {result.stopped}.")
    for name, why in result.left_out.items():
        data(f"left out: {name}: {why}")
    reasons = Counter(trial.reason for trial in result.trials if trial.state == "pruned" and trial.reason)
    for reason, number in reasons.most_common(5):
        data(f"pruned {number}: {reason}")
    for number, why in (result.rejected or {}).items():
        data(f"not verified: trial {number}: {why}")
    if result.best is not None and result.verified is not None:
        again = ", ".join(f"{name} {getattr(result.verified, name):.4g}" for name in result.best.measures)
        data(f"best: trial {result.best.number}, verified: {again}\n{result.best.pipeline}")
