"""`graphopt explain`: why each pass did what it did, and why it left alone what it left alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.tools.console import counted, data, emit_json, working
from graphopt.tools.sources import AsJson, PipelineText, Source, read_model

if TYPE_CHECKING:
    from graphopt.tools.pipelines import PassSummary

__all__ = ["explain"]

_SHOWN = 4
"""Nodes named for a reason before the rest is only counted."""


def explain(
    source: Source,
    pipeline: PipelineText = "exact",
    every: Annotated[bool, typer.Option("--all", help="Name every node instead of the first few.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every edit and every miss of a pipeline with its reason, folded and counted. Writes nothing."""
    with working("starting"):
        from graphopt.tools.pipelines import apply, parse, report_to_json, summarize

    steps = parse(pipeline)
    _, reports = apply(read_model(source), steps)
    summaries = summarize(reports)
    if as_json:
        passes = [_to_json(summary) for summary in summaries]
        emit_json(
            {"input": source, "pipeline": str(steps), "passes": passes, "reports": [report_to_json(r) for r in reports]}
        )
        return
    for summary in summaries:
        _show(summary, None if every else _SHOWN)


def _to_json(summary: PassSummary) -> dict[str, Any]:
    return {
        "pass": summary.text,
        "runs": summary.runs,
        "edits": [{"reason": reason, "count": len(nodes), "nodes": nodes} for reason, nodes in _edits(summary)],
        "misses": [{"reason": reason, "count": len(nodes), "nodes": nodes} for reason, nodes in _misses(summary)],
    }


def _show(summary: PassSummary, shown: int | None) -> None:
    data(f"{summary.text}: {counted(len(summary.edits), 'edit')}, {counted(len(summary.misses), 'miss')}")
    for mark, groups in (("+", _edits(summary)), ("-", _misses(summary))):
        for reason, nodes in groups:
            data(f"  {mark} {len(nodes)} x {reason}")
            data(f"      {_named(nodes, shown)}")


def _edits(summary: PassSummary) -> list[tuple[str, list[str]]]:
    return _grouped((f"{edit.kind.value}: {edit.why}", edit.node) for edit in summary.edits)


def _misses(summary: PassSummary) -> list[tuple[str, list[str]]]:
    return _grouped((miss.reason, miss.node) for miss in summary.misses)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for reason, node in pairs:
        groups.setdefault(reason, []).append(node)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _named(nodes: Sequence[str], shown: int | None) -> str:
    if shown is None or len(nodes) <= shown:
        return ", ".join(nodes)
    return f"{', '.join(nodes[:shown])} and {len(nodes) - shown:,} more"
