"""docs/operators.md says what the table says."""

from __future__ import annotations

from pathlib import Path

from graphopt.ops import TABLE
from graphopt.ops.__main__ import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "operators.md"


def test_operators_page_is_up_to_date() -> None:
    written, made = DOCUMENT.read_text().splitlines(), list(document())
    assert written == made, "run: python -m graphopt.ops > docs/operators.md"


def test_operators_page_lists_every_row() -> None:
    page = "\n".join(document())
    assert all(f"| `{name.removesuffix('.default')}` |" in page for name in TABLE)
    assert (
        "| `conv2d` | contracts axis -3, makes axis -3; `weight` axes 1 -> 0, window over the last 2 | MACs, literals |"
        in page
    )
    assert "| `dropout` | broadcast of `input` | training: `train`, random if `p` > 0 |" in page
    assert "nothing claimed" in page and "None" not in page
