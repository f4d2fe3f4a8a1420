"""`graphopt opt`: run a pipeline on a model and write the result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import UsageError
from graphopt.frontends import FORMATS
from graphopt.tools._diff_page import check_page_output, write_page
from graphopt.tools.console import counted, data, emit_json, say, show_table, size_text, working
from graphopt.tools.sources import AsJson, PipelineText, Source, check_output, read_model

if TYPE_CHECKING:
    from graphopt.analysis.cost import Cost
    from graphopt.instruments import Instrument, TimingTree
    from graphopt.model import Model
    from graphopt.tools.pipelines import PassSummary
    from graphopt.transform import Report

__all__ = ["opt"]


def opt(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", help=f"The file to write: {', '.join(FORMATS)}.")],
    pipeline: PipelineText = "exact",
    print_after: Annotated[
        str | None, typer.Option(metavar="NAME|change|all", help="Print the graph to stderr after these passes.")
    ] = None,
    dump_after: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass that changed something.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare outputs after every pass, within what it promises.")] = True,
    time: Annotated[bool, typer.Option("--time", help="Print a tree of seconds to stderr.")] = False,
    calib: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DATA.npz",
            help="A batch of inputs by name, to calibrate lossy passes with and to compare with; may be repeated.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Stop after about this many edits.")] = None,
    repro: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write a reproducer if a pass fails.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write a page with the graph before and after every pass.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run passes on a model, verify and check each, and write the result.

    OUT is replaced as a whole or not at all.
    """
    if output.suffix not in FORMATS:
        raise UsageError(f"'{output}' has none of the suffixes {', '.join(FORMATS)}")
    check_output(output, ours="model.json" if output.suffix == ".gopt" else None)
    if repro is not None:
        check_output(repro, ours="repro.json")
    if html is not None:
        check_page_output(html)
    with working("starting"):
        from graphopt.diff.steps import StepsPage
        from graphopt.tools.arrays import read_batch
        from graphopt.tools.pipelines import apply, parse

    steps = parse(pipeline)
    instruments, timing = _instruments(print_after, dump_after, time)
    model = read_model(source)
    batches = [read_batch(path, model.signature) for path in calib or ()]
    steps_page = StepsPage(source, model) if html is not None else None
    instruments += [steps_page] if steps_page else []
    result, reports = apply(model, steps, check=check, calib=batches, instruments=instruments, limit=limit, repro=repro)
    with working(f"writing {output}"):
        result.save(output)
    if html is not None and steps_page is not None:
        write_page(html, steps_page.page)
    if timing is not None:
        say(str(timing))
    if as_json:
        found = _to_json(model, result, reports)
        emit_json(
            {
                "input": source,
                "output": str(output),
                "pipeline": str(steps),
                **found,
                "timing": timing and asdict(timing.root),
            }
        )
    else:
        _show(model, result, reports)
    say(f"wrote {output}: {counted(sum(len(report.edits) for report in reports), 'edit')}")


def _instruments(
    print_after: str | None, dump_after: Path | None, time: bool
) -> tuple[list[Instrument], TimingTree | None]:
    from graphopt.instruments import DumpAfter, PrintAfter, TimingTree
    from graphopt.registry import get_pass

    instruments: list[Instrument] = []
    if print_after is not None:
        if print_after not in ("change", "all"):
            get_pass(print_after)  # an unknown name would silently print nothing
        instruments.append(PrintAfter(print_after, write=say))
    if dump_after is not None:
        instruments.append(DumpAfter(dump_after))
    timing = TimingTree() if time else None
    return [*instruments, *([timing] if timing else [])], timing


def _show(model: Model, result: Model, reports: list[Report]) -> None:
    from graphopt.analysis.cost import cost
    from graphopt.tools.pipelines import summarize

    numbers = ("runs", "edits", "misses", "ms", "error")
    show_table(("pass", *numbers), [_row(summary) for summary in summarize(reports)], right=numbers)
    for report in reports:
        _show_findings(report)
    show_table(("", "before", "after"), _costs(cost(model), cost(result)), right=("before", "after"))


def _show_findings(report: Report) -> None:
    """What a pass reports besides: lists of rows as tables, the rest as lines."""
    for name, value in report.findings.items():
        if isinstance(value, list):
            rows = [[_short(cell) for cell in row.values()] for row in value]
            show_table([name, *list(value[0])[1:]] if value else [name], rows, title=report.name)
        else:
            parts = value.items() if isinstance(value, dict) else [("", value)]
            data(f"{report.name}: {name} {', '.join(f'{key} {_short(part)}'.strip() for key, part in parts)}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(summary: PassSummary) -> tuple[object, ...]:
    error = f"{summary.check.error:.1e}" if summary.check else ""
    return (
        summary.text,
        summary.runs,
        len(summary.edits),
        len(summary.misses),
        f"{summary.seconds * 1000:.0f}",
        error,
    )


def _costs(before: Cost, after: Cost) -> list[tuple[str, str, str]]:
    rows = [
        ("operators", sum(before.operators.values()), sum(after.operators.values())),
        ("multiply-accumulates", before.macs, after.macs),
        ("other operations", before.operations, after.operations),
        ("parameters", before.parameters, after.parameters),
        ("bytes of weights", before.weight_bytes, after.weight_bytes),
        ("bytes moved", before.moved_bytes, after.moved_bytes),
        ("peak bytes of activations", before.peak_bytes, after.peak_bytes),
    ]
    return [(label, size_text(old), size_text(new)) for label, old, new in rows]


def _to_json(model: Model, result: Model, reports: list[Report]) -> dict[str, Any]:
    from graphopt.analysis.cost import cost
    from graphopt.tools.pipelines import report_to_json, totals

    return {
        "history": list(result.history),
        "cost_before": totals(cost(model)),
        "cost_after": totals(cost(result)),
        "reports": [report_to_json(report) for report in reports],
    }
