"""The table of merging against pruning is the one that was measured."""

from __future__ import annotations

import json

from benchmarks.merging import NETS, methods_of
from benchmarks.merging_table import PAGE, RESULTS, page


def test_the_page_shows_the_results() -> None:
    text, results = PAGE.read_text(), json.loads(RESULTS.read_text())
    assert page(text, results) == text, "run: python -m benchmarks.merging --table"
    assert results["nets"].keys() == set(NETS)
    for net, parts in results["nets"].items():
        assert {"merge", "prune", "merge and prune"} <= parts["0.6"].keys()
        for part, methods in parts.items():
            assert methods.keys() <= set(methods_of(net, float(part)))
            for method, rows in methods.items():
                for row in rows:
                    # Measured again, on the fine-tuned net. Few layers are coarse steps, so that it may be far below.
                    asked = 1.0 if method == "nothing, tuned longer" else float(part)
                    assert "refused" in row or row["again"] < 1.1 * asked, (net, part, method)
                    assert "refused" in row or 0.1 < row["after"] <= 1
