"""The table of latency budgets is the one that was measured."""

from __future__ import annotations

import json

from benchmarks import pruned_latency


def test_the_page_shows_the_results() -> None:
    text, results = pruned_latency.PAGE.read_text(), json.loads(pruned_latency.RESULTS.read_text())
    assert pruned_latency.page(text, results) == text, "run: python -m benchmarks.pruned_latency --table"
    assert results["nets"].keys() >= set(pruned_latency.NETS)
    for name, row in results["nets"].items():
        assert f"| {name} | {row['asked']} | {row.get('achieved', 'refused')} |" in text
