"""`graphopt build`: compile a model into a bundle that runs without torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.tools.console import counted, emit_json, say, show_table, size_text, working
from graphopt.tools.sources import AsJson, BackendName, PipelineText, Source, Threads, check_output, read_model

if TYPE_CHECKING:
    from graphopt.backends.tvm.kernels.coverage import Coverage
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
    model, reports = apply(read_model(source), steps)
    if verbose:
        _tell(reports)
    start = time.perf_counter()
    with working(f"compiling with {backend} for {target}"):
        artifact = compiled(model, machine, backend, threads=threads, exact_float=exact_float)
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
        "bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
    }
    if as_json:
        facts |= {"input": source, "pipeline": str(steps), "signature": artifact.signature.to_json()}
        facts["coverage"] = None if coverage is None else coverage.to_json()
        emit_json(facts)
    else:
        show_table(("", ""), [(name, size_text(value)) for name, value in facts.items()])


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
