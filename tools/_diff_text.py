"""A diff on the terminal, to be read from the top: summary, costs, changed regions by module, numbers, latency."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from graphopt.tools._diff_rows import (
    Fold,
    Line,
    cost_rows,
    entry_lines,
    folded,
    module_rows,
    operator_rows,
    shape_rows,
    side_rows,
    weight_rows,
)
from graphopt.tools._escape import printable
from graphopt.tools.console import counted, data, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.diff import GraphDiff, NumbersDiff

__all__ = ["show_diff", "show_stat"]

_COLOURS = {
    "-": "red",
    "+": "green",
    "~": "yellow",
    " ": "dim",
    "rewritten": "magenta",
    "removed": "red",
    "inserted": "green",
    "changed": "yellow",
    "moved": "cyan",
    "pruned": "red",
    "widened": "green",
    "permuted": "cyan",
}
_UNLIMITED = 100_000
_PROFILE = 24


def show_diff(diff: GraphDiff, *, context: int, only: str | None) -> None:
    """Write all of it to stdout, or only the part that is asked for."""
    for label, source, text in side_rows(diff):
        data(f"{label}: {printable(source)}  {printable(text)}")
    _styled([(printable(diff.summary()), "bold")])
    if only in (None, "cost"):
        _costs(diff, every=only == "cost")
    if only in (None, "ops"):
        _regions(diff, context)
    if only == "weights":
        show_table(("tensor", "shape", "what became of it"), _safe(weight_rows(diff)))
    if only == "shapes":
        show_table(("node", "before", "after", ""), _safe(shape_rows(diff)))
    if diff.numbers is not None and only in (None, "ops"):
        _numbers(diff, diff.numbers)
    if diff.latency is not None and only in (None, "cost"):
        a, b = diff.latency.a, diff.latency.b
        data(
            f"latency with {diff.latency.backend}: {1000 * a.median:.3f} ms -> {1000 * b.median:.3f} ms "
            f"({100 * (diff.latency.ratio - 1):+.1f} %)"
        )


def show_stat(diff: GraphDiff) -> None:
    """How many differences there are in each module, and the totals."""
    modules: dict[str, dict[str, int]] = {}
    for entry in diff.entries:
        row = modules.setdefault(entry.path.partition(".")[0] or "(top)", {})
        row[entry.kind] = row.get(entry.kind, 0) + 1
    kinds = list(diff.counts())
    if kinds:
        rows = [(printable(path), *(row.get(kind, 0) or "" for kind in kinds)) for path, row in modules.items()]
        show_table(("module", *kinds), rows, right=kinds)
    _costs(diff, every=False)
    data(printable(diff.summary()))


def _costs(diff: GraphDiff, *, every: bool) -> None:
    rows = cost_rows(diff, every=every)
    if rows:
        show_table(("", "a", "b", "change"), rows, right=("a", "b", "change"))
    operators = operator_rows(diff)
    if operators:
        show_table(("operator", "a", "b"), _safe(operators), right=("a", "b"))
    if every:
        heads = ("macs a", "macs b", "parameters a", "parameters b")
        show_table(("module", *heads), _safe(module_rows(diff)), right=heads)


def _safe(rows: Iterable[Iterable[object]]) -> list[list[str]]:
    return [[printable(str(cell)) for cell in row] for row in rows]


def _regions(diff: GraphDiff, context: int) -> None:
    for module, folds in groupby(folded(diff), key=lambda fold: fold.module):
        rows = list(folds)
        number = sum(len(fold.entries) for fold in rows)
        _styled([(printable(module or "(top)"), "bold"), (f"  {counted(number, 'difference')}", "dim")])
        for fold in rows:
            _fold(diff, fold, context)


def _fold(diff: GraphDiff, fold: Fold, context: int) -> None:
    entry = fold.entries[0]
    times = f"{len(fold.entries)} x " if len(fold.entries) > 1 else ""
    passes = f"  [{', '.join(entry.passes)}]" if entry.passes else ""
    place = f"  in {entry.path}" if entry.path else ""
    if len(fold.entries) > 1:
        place += " and others, the first of which:"
    _styled(
        [
            (f"  {times}{entry.kind} ", _COLOURS[entry.kind]),
            (printable(entry.title), ""),
            (printable(passes), "blue"),
            (printable(place), "dim"),
        ]
    )
    for line in entry_lines(diff, entry, context):
        _line(line)


def _line(line: Line) -> None:
    _styled([(f"    {line.mark} {printable(line.text)}", _COLOURS[line.mark])])


def _numbers(diff: GraphDiff, numbers: NumbersDiff) -> None:
    kind = "seeded" if numbers.seeded else "given"
    outputs = ", ".join("another shape" if error is None else f"{error:.2g}" for error in numbers.outputs)
    data(f"run on {kind} inputs: error of the outputs {outputs or 'none'}")
    if numbers.first is None:
        return
    item = diff.a.view.items[numbers.first.a]
    data(
        printable(
            f"the numbers part at '{item.name}' ({item.operator}) {item.path}: error {numbers.first.error or 0:.2g}"
        )
    )
    rows = [row for row in numbers.profile if row.error is not None]
    step = max(len(rows) // _PROFILE, 1)
    shown = [(diff.a.view.items[row.a].name, f"{row.error:.2g}", _bar(row.error or 0.0)) for row in rows[::step]]
    show_table(("along the graph", "error", ""), _safe(shown), right=("error",))


def _bar(error: float) -> str:
    """Longer by one for every order of magnitude above 1e-8."""
    import math

    if not error:
        return ""
    return "#" * (9 if math.isinf(error) else max(0, min(9, round(math.log10(error) + 8))))


def _styled(parts: list[tuple[str, str]]) -> None:
    from rich.text import Text

    _console().print(Text.assemble(*parts), soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _UNLIMITED
    return Console(file=sys.stdout, width=width, highlight=False, emoji=False)
