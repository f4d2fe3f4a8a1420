"""The page of `graphopt sensitivity --html`: a heat map, a row for each family of units, a column for each fraction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.passes._sensitivity import Row

__all__ = ["heat_map"]

_MOST_DECADES = 3
"""Errors smaller than the largest by more than this have the colour of nothing."""
_FLIP = 0.58
"""Where text on both colour scales, light and dark, is as readable in black as in white."""


@dataclass(frozen=True)
class _Scale:
    """The errors that the colours span, by their logarithms."""

    low: float
    high: float

    @classmethod
    def of(cls, errors: Iterable[float | None]) -> _Scale:
        logarithms = [math.log10(error) for error in errors if error] or [0.0]
        high = max(logarithms)
        return cls(max(min(*logarithms, high - 1), high - _MOST_DECADES), high)

    def place(self, error: float) -> float:
        """Between 0 and 1."""
        logarithm = math.log10(error) if error else self.low
        return min(max((logarithm - self.low) / (self.high - self.low), 0.0), 1.0)


def heat_map(title: str, importance: str, rows: Sequence[Row]) -> str:
    """A page that needs nothing else: the error of every row as a colour and a number, cut and refitted."""
    scale = _Scale.of(error for row in rows for error in (row.error, row.refitted))
    views, note = [("cut", [row.error for row in rows])], ""
    if any(row.refitted is not None for row in rows):
        views.append(("refitted and cut", [row.refitted for row in rows]))
        note = "Refitted errors are those of the data that were fitted to: where these are few, new data lose more."
    fractions = list(dict.fromkeys(row.fraction for row in rows))
    lines = groupby(range(len(rows)), lambda index: rows[index].label)
    body = [_line(rows, views, list(indices), scale) for _, indices in lines]
    return _PAGE.format(
        title=escape(title),
        importance=escape(importance),
        note=note,
        head=_head([name for name, _ in views], fractions),
        body="\n".join(body) or '<tr><td colspan="9">Nothing can be removed.</td></tr>',
        legend=_legend(scale),
    )


def _head(views: Sequence[str], fractions: Sequence[float]) -> str:
    tops = "".join(f'<th scope="colgroup" colspan="{len(fractions)}" class="view">{view}</th>' for view in views)
    columns = "".join(
        f'<th scope="col"{_first(place)}>{100 * fraction:g} %</th>'
        for _ in views
        for place, fraction in enumerate(fractions)
    )
    return (
        f'<tr><th rowspan="2" scope="col">group</th><th rowspan="2" scope="col">units</th>{tops}</tr><tr>{columns}</tr>'
    )


def _first(place: int) -> str:
    return "" if place else ' class="view"'


def _line(
    rows: Sequence[Row], views: Sequence[tuple[str, Sequence[float | None]]], indices: Sequence[int], scale: _Scale
) -> str:
    first = rows[indices[0]]
    cells = [
        _cell(rows[index], errors[index], scale, starts=index == indices[0]) for _, errors in views for index in indices
    ]
    return f'<tr><th scope="row">{escape(first.label)}</th><td class="units">{first.units}</td>{"".join(cells)}</tr>'


def _cell(row: Row, error: float | None, scale: _Scale, *, starts: bool) -> str:
    place = scale.place(error or 0.0)
    if error is None:
        look, text = "unknown", "?"
    elif not row.removed:
        look, text = "none", "-"
    else:
        look, text = "high" if place > _FLIP else "", f"{error:.2g}"
    classes = " ".join(filter(None, ("cell", look, "view" if starts else "")))
    return (
        f'<td class="{classes}" tabindex="-1" style="--v:{100 * place:.0f}%" title="{escape(_story(row))}">{text}</td>'
    )


def _story(row: Row) -> str:
    """Everything that is known of a row."""
    parts = [f"{row.label}: {row.removed} of {row.units} units go ({100 * row.fraction:g} % asked)"]
    if row.reason:
        parts.append(row.reason)
    if row.error is not None:
        parts.append(f"error {row.error:.4g}")
    if row.refitted is not None:
        parts.append(f"refitted {row.refitted:.4g}")
    if row.macs is not None and row.parameters is not None:
        parts.append(f"left {100 * row.macs:.4g} % of multiply-accumulates, {100 * row.parameters:.4g} % of parameters")
    return "; ".join(parts)


def _legend(scale: _Scale) -> str:
    """The colours, with the errors at both ends and at the powers of ten between that have room."""
    powers = [10.0**power for power in range(math.ceil(scale.low), math.floor(scale.high) + 1)]
    inner = [(scale.place(power), f"{power:g}") for power in powers if 0.12 < scale.place(power) < 0.88]
    ends = [(0.0, f"≤ {10**scale.low:.2g}"), (1.0, f"{10**scale.high:.2g}")]
    ticks = "".join(f'<span style="left:{100 * place:.1f}%">{text}</span>' for place, text in [*ends, *inner])
    return f'<div class="bar"></div><div class="ticks">{ticks}</div>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: sensitivity</title><style>
:root {{ color-scheme: light dark; --text: #222; --soft: #666; --line: #ddd; --page: #fff;
  --low: #fff4cf; --high: #4a0a3c; --on-low: #000; --on-high: #fff }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #ddd; --soft: #9a9a9a; --line: #3a3f45; --page: #0b0e11;
  --low: #17142b; --high: #f5c451; --on-low: #fff; --on-high: #000 }} }}
body {{ margin: 0; padding: 1.2em 1.6em 4.5em; font: 14px/1.45 system-ui, sans-serif; color: var(--text);
  background: var(--page) }}
h1 {{ font-size: 1.25em; margin: 0 0 .3em }} p {{ color: var(--soft); margin: .2em 0 1em; max-width: 60em }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums }}
th {{ font-weight: 600; text-align: left; padding: .15em .6em .15em 0; white-space: nowrap }}
thead th {{ vertical-align: bottom; color: var(--soft) }} thead tr + tr th, .units {{ text-align: right }}
thead tr + tr th {{ padding-right: .4em }} tbody th {{ font: 12px ui-monospace, monospace }}
.units {{ color: var(--soft); padding-right: .6em }} .view {{ border-left: 1.2em solid transparent }}
.cell {{ min-width: 4.4em; padding: .28em .4em; text-align: right; background-clip: padding-box;
  background-color: color-mix(in oklch, var(--high) var(--v), var(--low)); color: var(--on-low); cursor: default }}
.cell.high {{ color: var(--on-high) }} .cell.none {{ background-color: transparent; color: var(--soft) }}
.cell.unknown {{ color: var(--text); background: padding-box
  repeating-linear-gradient(45deg, var(--line) 0 3px, transparent 3px 8px) }}
.cell:focus {{ outline: 2px solid #1f7ae0; outline-offset: 1px }}
.legend {{ margin: 1.4em 2em .8em; width: 28em; max-width: 90% }}
.bar {{ height: 1em; background: linear-gradient(in oklch to right, var(--low), var(--high)) }}
.ticks {{ position: relative; height: 1.6em; font-size: 12px; color: var(--soft) }}
.ticks span {{ position: absolute; transform: translateX(-50%); white-space: nowrap }}
output {{ position: fixed; inset: auto 0 0; min-height: 1.45em; padding: .7em 1.6em; background: var(--page);
  border-top: 1px solid var(--line) }}
</style></head><body>
<h1>{title}</h1>
<p>How much of the outputs is lost on calibration data when a part of one group goes, alone: the error relative to the
outputs. The units of least importance ({importance}) go first. {note}</p>
<div class="wide"><table role="grid" aria-label="error by group and fraction removed">
<thead>{head}</thead><tbody>
{body}
</tbody></table></div>
<div class="legend">{legend}</div>
<p>- the fraction is less than a unit; ? the error is not known, with the reason in the line below. Groups stand in the
order of the graph. Arrow keys move from cell to cell.</p>
<output aria-live="polite">Point at a cell, or press Tab, to see its numbers.</output>
<script>
const grid = [...document.querySelectorAll("tbody tr")].map(row => [...row.querySelectorAll(".cell")]);
const steps = {{ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}};
const line = document.querySelector("output");
if (grid[0]?.length) grid[0][0].tabIndex = 0;
grid.forEach((cells, y) => cells.forEach((cell, x) => {{
  const tell = () => {{ line.textContent = cell.title; }};
  cell.onmouseenter = tell;
  cell.onclick = () => cell.focus();
  cell.onfocus = () => {{
    document.querySelector('.cell[tabindex="0"]').tabIndex = -1;
    cell.tabIndex = 0;
    tell();
  }};
  cell.onkeydown = event => {{
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    grid[y + step[0]]?.[x + step[1]]?.focus();
  }};
}}));
</script></body></html>
"""
