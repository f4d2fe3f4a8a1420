"""The table of latency budgets is the one that was measured."""

from __future__ import annotations

import json

from benchmarks.pruned_latency import PRUNED


def test_the_page_shows_the_results() -> None:
    text, results = PRUNED.page.read_text(), json.loads(PRUNED.results.read_text())
    assert PRUNED.text(text, results) == text, "run: python -m benchmarks.pruned_latency --table"
    assert results["nets"].keys() >= PRUNED.nets.keys()
    for name, row in results["nets"].items():
        assert f"| {name} | {row['asked']} | {row.get('achieved', 'refused')} |" in text
