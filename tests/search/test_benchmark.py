"""The table of docs/search.md is the one that was measured, and the best is at least as good as each pass alone."""

from __future__ import annotations

import json

from benchmarks.search import GOAL, PAGE, RESULTS, page


def test_the_page_shows_the_results() -> None:
    text, results = PAGE.read_text(), json.loads(RESULTS.read_text())
    assert page(text, results) == text, "run: python -m benchmarks.search --table"
    assert RESULTS.with_suffix(".svg").exists()


def test_the_best_is_within_the_goal_and_loses_no_more_than_each_pass_alone() -> None:
    results = json.loads(RESULTS.read_text())
    best, limit = results["best"], GOAL["latency"]
    assert best["latency"] <= limit and best["verified"]["latency"] <= 1.02 * limit
    alone = [row for row in [*results["alone"].values(), results["best alone"]] if row.get("latency", 1) <= limit]
    assert alone and all(best["loss"] <= row["loss"] for row in alone)
    texts = [one["pipeline"] for one in results["search"]["trials"]]
    assert len(texts) == len(set(texts)) >= len(results["alone"])
    for trial in results["search"]["trials"]:
        assert (trial["found"] is not None) == (trial["state"] == "complete")
        assert trial["state"] != "pruned" or trial["reason"]
