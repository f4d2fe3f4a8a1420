"""The plot of `graphopt rank`: a bar for every layer, how much of its full rank is there and how much is utilised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from graphopt.passes._rank_table import Row

__all__ = ["rank_plot"]

_BAR, _WIDE, _LEFT, _TOP = 18, 520, 260, 70
_SERIES = (("full", "#e3e6ea"), ("rank", "#b9c4d0"), ("effective", "#7fa8d1"), ("utilised", "#1f5f9e"))
"""Names of what is drawn over each other, from the longest on, and colours."""


def rank_plot(source: str, energy: float, rows: Sequence[Row]) -> str:
    """An SVG picture; lengths are parts of the full rank of each layer."""
    bars = [_bar(index, row) for index, row in enumerate(rows)]
    height = _TOP + _BAR * len(rows) + 20
    legend = [
        f'<rect x="{_LEFT + 130 * i}" y="40" width="12" height="12" fill="{colour}"/>'
        f'<text x="{_LEFT + 130 * i + 18}" y="50">{name}</text>'
        for i, (name, colour) in enumerate(_SERIES)
    ]
    title = f"Ranks of {source}, utilised for {100 * energy:g} % of the outputs' energy"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDE + 150}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="16" y="24" font-size="15">{escape(title)}</text>',
        *legend,
        *bars,
        "</svg>\n",
    ])  # fmt: skip


def _bar(index: int, row: Row) -> str:
    y = _TOP + _BAR * index
    parts = {"full": 1.0, **{name: getattr(row, name) / max(row.full, 1) for name, _ in _SERIES[1:]}}
    drawn = "".join(
        f'<rect x="{_LEFT}" y="{y}" width="{_WIDE * parts[name]:.1f}" height="{_BAR - 4}" fill="{colour}"/>'
        for name, colour in sorted(_SERIES, key=lambda pair: -parts[pair[0]])
    )
    name = escape(row.layer[-40:])
    numbers = f"{row.utilised} of {row.full}"
    return (
        f"<g><title>{escape(row.layer)}: rank {row.rank}, effective {row.effective:.1f}, utilised {numbers}</title>"
        f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end">{name}</text>{drawn}'
        f'<text x="{_LEFT + _WIDE + 8}" y="{y + 11}">{numbers}</text></g>'
    )
