"""`graphopt explain`: why each pass did what it did, and why it left alone what it left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
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
    every: Annotated[
        bool, typer.Option("--all", help="Name every node, with its own reason, instead of the first few.")
    ] = False,
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
        _show(summary, every=every)


def _to_json(summary: PassSummary) -> dict[str, Any]:
    return {
        "pass": summary.text,
        "runs": summary.runs,
        "edits": [group.to_json() for group in _edits(summary)],
        "misses": [group.to_json() for group in _misses(summary)],
    }


def _show(summary: PassSummary, *, every: bool) -> None:
    data(f"{summary.text}: {counted(len(summary.edits), 'edit')}, {counted(len(summary.misses), 'miss')}")
    for mark, groups in (("+", _edits(summary)), ("-", _misses(summary))):
        for group in groups:
            data(f"  {mark} {len(group.nodes)} x {group.reason}")
            for line in group.lines(every=every):
                data(f"      {line}")


@dataclass(frozen=True)
class _Group:
    """Nodes with one reason, or with reasons that differ only in the names they quote."""

    pairs: tuple[tuple[str, str], ...]

    @property
    def nodes(self) -> list[str]:
        return [node for _, node in self.pairs]

    @property
    def reason(self) -> str:
        """The reason, quoted names that differ written as `'*'`."""
        first = self.pairs[0][0]
        return first if all(reason == first for reason, _ in self.pairs) else _without_names(first)

    def lines(self, *, every: bool) -> list[str]:
        if every:
            return [node if reason == self.reason else f"{node}: {reason}" for reason, node in self.pairs]
        rest = len(self.pairs) - _SHOWN
        return [", ".join(self.nodes[:_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")]

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason, "count": len(self.pairs), "nodes": self.nodes}


def _edits(summary: PassSummary) -> list[_Group]:
    return _grouped((f"{edit.kind.value}: {edit.why}", edit.node) for edit in summary.edits)


def _misses(summary: PassSummary) -> list[_Group]:
    return _grouped((miss.reason, miss.node) for miss in summary.misses)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[_Group]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for reason, node in pairs:
        groups.setdefault(_without_names(reason), []).append((reason, node))
    return sorted((_Group(tuple(group)) for group in groups.values()), key=lambda group: -len(group.pairs))


def _without_names(reason: str) -> str:
    return re.sub(r"'[^']*'", "'*'", reason)
