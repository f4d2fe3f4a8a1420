"""`graphopt build`: compile a model into a bundle that runs without torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.errors import UsageError
from graphopt.tools.console import counted, emit_json, say, show_table, size_text, working
from graphopt.tools.sources import AsJson, BackendName, PipelineText, Source, Threads, check_output, read_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphopt.backend import Artifact
    from graphopt.backends.tvm.kernels.coverage import Coverage
    from graphopt.model import Model
    from graphopt.target import Target
    from graphopt.transform import Report

__all__ = ["build"]


def build(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write.")],
    target: Annotated[str, typer.Option(help="A preset of `graphopt targets`, or a JSON file.")] = "cpu",
    pipeline: PipelineText = "exact",
    backend: BackendName = "tvm",
    threads: Threads = None,
    exact_float: Annotated[
        bool, typer.Option("--exact-float", help="Use no algorithm that rounds more than the plain one.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the compiled model with PyTorch where it runs here.")
    ] = True,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Time it where it runs here and record that; no two such builds are alike."),
    ] = False,
    wheels: Annotated[
        list[Path] | None,
        typer.Option(
            "--runtime-wheel", metavar="FILE.whl", help="TVM's runtime for the target; kept for later builds."
        ),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch-runtime", help="Download TVM's runtime for the target with pip, if it is missing.")
    ] = False,
    tuned: Annotated[
        Path | None,
        typer.Option("--tuned", metavar="DIR", help="Use what `graphopt tune --db DIR` measured, or `shipped`."),
    ] = None,
    tune: Annotated[
        str | None, typer.Option("--tune", metavar="TIME", help="Measure first, for 90s, 10m or 1h; needs --tuned.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell to stderr what each pass did and what wrote each kernel.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run passes on a model, compile the result and write it as a folder. An older bundle there is replaced whole."""
    from graphopt.backend import build as compiled
    from graphopt.backend import check_exact, check_threads, get_backend
    from graphopt.target import Target

    check_output(output, ours="manifest.json")
    machine = Target.parse(target)
    check_exact(get_backend(backend), exact_float)
    check_threads(machine.cores if threads is None else threads, where=f"the cores of the target '{target}'")
    with working("starting"):
        from graphopt.tools.pipelines import apply, parse

    steps = parse(pipeline)
    _check_tuning(backend, tuned, tune)
    _get_parts(backend, machine, wheels or (), fetch=fetch)
    model, reports = apply(read_model(source), steps)
    if verbose:
        _tell(reports)
    if tune is not None:
        _tune(model, machine, tune, tuned, threads, exact_float=exact_float)
    start = time.perf_counter()
    with working(f"compiling with {backend} for {target}"):
        artifact = compiled(model, machine, backend, threads=threads, exact_float=exact_float, tuned=tuned)
    if check or measure:
        with working("running what was compiled"):
            _try(artifact, model, check=check, measure=measure)
    with working(f"writing {output}"):
        artifact.save(output)
    coverage: Coverage | None = getattr(artifact, "coverage", None)
    if verbose and coverage is not None:
        _tell_coverage(coverage)
    facts = {
        "bundle": str(output),
        "backend": backend,
        "target": target,
        "threads": artifact.threads,
        "exact_float": exact_float,
        "seconds": round(time.perf_counter() - start, 3),
        **{name: artifact.record.get(name) for name in ("check", "latency")},
        **({"tuned": artifact.record.get("tuned")} if tuned is not None else {}),
        "bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
    }
    if as_json:
        facts |= {"input": source, "pipeline": str(steps), "signature": artifact.signature.to_json()}
        facts["coverage"] = None if coverage is None else coverage.to_json()
        emit_json(facts)
    else:
        show_table(("", ""), [(name, _shown(value)) for name, value in facts.items()])


def _check_tuning(backend: str, tuned: Path | None, tune: str | None) -> None:
    """Refuse options that do not go together, before anything is read."""
    from graphopt.backend import get_backend
    from graphopt.tools.tune import seconds_of

    if tune is not None:
        seconds_of(tune)
        if tuned is None:
            raise UsageError("--tune needs a place for what it measures", todo="name a folder with --tuned DIR")
        if str(tuned) == "shipped":
            raise UsageError("what is shipped cannot be added to", todo="name another folder: it is used there too")
    if tuned is not None and not get_backend(backend).tunes:
        raise UsageError(f"the backend '{backend}' takes no measured choices", todo="leave --tuned out")


def _tune(
    model: Model, machine: Target, time_: str, place: Path | None, threads: int | None, *, exact_float: bool
) -> None:
    from graphopt.tools.tune import seconds_of, tuned_model

    assert place is not None  # checked before
    tuned_model(model, machine, place, seconds_of(time_), threads=threads, exact_float=exact_float)


def _get_parts(backend: str, machine: Target, wheels: Sequence[Path], *, fetch: bool) -> None:
    """See to what saving needs before anything is compiled: compilers, and the runtime of another architecture."""
    from graphopt.backend import get_backend

    if backend == "tvm" and (wheels or fetch):
        from graphopt.backends.tvm.bundle import wheels as runtime

        for wheel in wheels:
            runtime.add(wheel)
        if fetch and machine.kind != "cuda":
            with working("downloading"):
                runtime.fetch(machine.arch)
    get_backend(backend).require_parts(machine)


def _try(artifact: Artifact, model: Model, *, check: bool, measure: bool) -> None:
    """Run what was compiled on seeded inputs, and record how far it is from PyTorch and how long it takes."""
    from graphopt.target import why_not_here
    from graphopt.tools.trial import compared, timed

    if why_not_here(artifact.target) is not None:
        return
    if check:
        artifact.record["check"] = compared(artifact, model)
    if measure:
        artifact.record["latency"] = timed(artifact, model)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "not taken" if value is None else size_text(value)


def _tell(reports: list[Report]) -> None:
    for report in reports:
        edits, misses = counted(len(report.edits), "edit"), counted(len(report.misses), "miss")
        say(f"{report.seconds * 1000:9.1f} ms  {report.text}: {edits}, {misses}")


def _tell_coverage(coverage: Coverage) -> None:
    """How many functions each kernel rule took, and the names of those that none took."""
    taken = [f"{rule} {len(names)}" for rule, names in coverage.rules.items()]
    functions = counted(sum(map(len, coverage.rules.values())), "function")
    say(f"kernels wrote {functions}{': ' if taken else ''}{', '.join(taken)}")
    for position, name in enumerate(coverage.general):
        if position == 0:
            say(f"no kernel for {counted(len(coverage.general), 'function')}, which the general schedule wrote:")
        say(f"  {name}")
