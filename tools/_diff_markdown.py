"""A diff as Markdown, for a comment in a code review: what matters first, the rest folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graphopt.tools._diff_rows import cost_rows, entry_lines, folded, operator_rows, side_rows, weight_rows
from graphopt.tools._escape import markdown, printable

if TYPE_CHECKING:
    from graphopt.diff import GraphDiff

__all__ = ["as_markdown"]

_MOST = 50
"""Rows of a table; a comment has a limit, and a reader too."""


def as_markdown(diff: GraphDiff, *, context: int) -> str:
    """The whole comment."""
    names = " and ".join(markdown(source) for _, source, _ in side_rows(diff))
    parts = [f"### Models {names}: {markdown(diff.summary())}"]
    costs = [*cost_rows(diff), *((name, x, y, "") for name, x, y in operator_rows(diff))]
    if costs:
        parts.append(_table(("", "a", "b", "change"), costs))
    if diff.entries:
        rows = []
        for fold in folded(diff):
            entry = fold.entries[0]
            rows.append((len(fold.entries), entry.kind, entry.title, entry.path, ", ".join(entry.passes)))
        parts.append(_table(("times", "kind", "what", "module", "passes"), rows))
    weights = weight_rows(diff)
    if weights:
        parts.append(_details("Weights", _table(("tensor", "shape", "what became of it"), weights)))
    if diff.entries:
        parts.append(_details("Regions", _regions(diff, context)))
    if diff.numbers is not None and diff.numbers.first is not None:
        item = diff.a.view.items[diff.numbers.first.a]
        parts.append(f"The numbers part at {markdown(item.name)}: error {diff.numbers.first.error or 0:.2g}.")
    if diff.latency is not None:
        a, b = diff.latency.a.median, diff.latency.b.median
        parts.append(f"Latency with {markdown(diff.latency.backend)}: {1000 * a:.3f} ms, then {1000 * b:.3f} ms.")
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Iterable[object]]) -> str:
    lines = [_row(heads), _row(["---"] * len(heads), raw=True)]
    lines += [_row(row) for row in rows[:_MOST]]
    if len(rows) > _MOST:
        lines.append(_row([f"{len(rows) - _MOST} more", *[""] * (len(heads) - 1)]))
    return "\n".join(lines)


def _row(cells: Iterable[object], *, raw: bool = False) -> str:
    return f"| {' | '.join(str(cell) if raw else markdown(str(cell)) for cell in cells)} |"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _regions(diff: GraphDiff, context: int) -> str:
    """As a block whose lines are coloured by their first sign; none begins with a fence, so none ends the block."""
    lines = []
    for fold in folded(diff)[:_MOST]:
        entry = fold.entries[0]
        lines.append(f"# {len(fold.entries)} x {entry.kind} {printable(entry.title)}")
        for line in entry_lines(diff, entry, context):
            lines.append(f"{'!' if line.mark == '~' else line.mark} {printable(line.text)}")
    return "\n".join(["```diff", *lines, "```"])
