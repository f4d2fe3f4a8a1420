"""`graphopt build`: compile a model into a bundle that runs without torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.tools.console import counted, emit_json, say, show_table, size_text, working
from graphopt.tools.sources import AsJson, BackendName, PipelineText, Source, Threads, check_output, read_model

if TYPE_CHECKING:
    from graphopt.transform import Report

__all__ = ["build"]


def build(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write.")],
    target: Annotated[str, typer.Option(help="A preset of `graphopt targets`, or a JSON file.")] = "cpu",
    pipeline: PipelineText = "exact",
    backend: BackendName = "tvm",
    threads: Threads = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell to stderr what each pass did.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run passes on a model, compile the result and write it as a folder. An older bundle there is replaced whole."""
    from graphopt.backend import check_threads, get_backend
    from graphopt.target import Target

    check_output(output, ours="manifest.json")
    machine, compiler = Target.parse(target), get_backend(backend)()
    check_threads(machine.cores if threads is None else threads, where=f"the cores of the target '{target}'")
    with working("starting"):
        from graphopt.tools.pipelines import apply, parse

    steps = parse(pipeline)
    model, reports = apply(read_model(source), steps)
    if verbose:
        _tell(reports)
    start = time.perf_counter()
    with working(f"compiling with {backend} for {target}"):
        artifact = compiler.compile(model, machine, threads=threads)
        artifact.save(output)
    facts = {
        "bundle": str(output),
        "backend": backend,
        "target": target,
        "threads": artifact.threads,
        "seconds": round(time.perf_counter() - start, 3),
        "bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
    }
    if as_json:
        facts |= {"input": source, "pipeline": str(steps), "signature": artifact.signature.to_json()}
        emit_json(facts)
    else:
        show_table(("", ""), [(name, size_text(value)) for name, value in facts.items()])


def _tell(reports: list[Report]) -> None:
    for report in reports:
        edits, misses = counted(len(report.edits), "edit"), counted(len(report.misses), "miss")
        say(f"{report.seconds * 1000:9.1f} ms  {report.text}: {edits}, {misses}")
