"""The tables of docs/lowrank.md are the ones that were measured, and what the page says of them holds."""

from __future__ import annotations

import json
from statistics import mean

from benchmarks import lowrank_table
from benchmarks.lowrank_latency import LOW_RANK

OTHERS = ("ALDS", "uniform SVD", "Greenformer")


def test_the_page_shows_the_results() -> None:
    text = lowrank_table.PAGE.read_text()
    assert lowrank_table.page(text) == text, "run: python -m benchmarks.lowrank --table"


def test_less_is_lost_than_by_others_at_equal_size() -> None:
    nets = json.loads(lowrank_table.RESULTS.read_text())["nets"]
    compared = 0
    for parts in nets.values():
        for methods in parts.values():
            ours, others = methods["low-rank"], [methods[name] for name in OTHERS]
            for other in others:
                for when, slack in (("before", 0.0), ("after", 0.001)):
                    assert mean(row[when] for row in ours) >= mean(row[when] for row in other) - slack
                    compared += 1
    assert compared == 3 * 2 * 3 * 2


def test_the_page_shows_what_a_latency_came_to() -> None:
    text, results = lowrank_table.PAGE.read_text(), json.loads(LOW_RANK.results.read_text())
    assert LOW_RANK.text(text, results) == text, "run: python -m benchmarks.lowrank_latency --table"
    for row in results["nets"].values():
        assert "refused" in row or abs(row["again"] / row["asked"] - 1) < 0.05


def test_a_billion_parameters_take_the_memory_of_two_and_a_half_of_the_largest_layer() -> None:
    results = json.loads(lowrank_table.MEMORY.read_text())
    assert "without data" in results
    for kind, row in results.items():
        assert row["parameters"] >= 1e9 and 0.49 < row["kept"] <= 0.5, kind
        assert row["memory_bytes"] < 2.5 * row["largest_bytes"], kind
