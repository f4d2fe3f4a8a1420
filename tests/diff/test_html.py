"""The page as a file: what it holds, that it needs nothing else, and that no name can break out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt as go
from graphopt.diff import GraphDiff, html
from graphopt.diff.html import html_page
from graphopt.diff.supergraph import Row, groups_of, rows_of
from graphopt.errors import UsageError
from tests.diff.nets import captured
from tests.diff.test_regions import between
from tests.tools.command import graphopt, refused


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def pruned() -> GraphDiff:
    model = captured("resnet")
    return go.diff(model, go.run(model, "remove-channels{layer=blocks.1.conv1,indices=2;5}")[0], names=("a", "b"))


# What it holds


def test_a_page_of_a_pruned_net(pruned: GraphDiff) -> None:
    data = data_of(pruned.to_html())
    (step,), (found,) = data["steps"], data["comparisons"]
    a, b = (data["graphs"][found[side]] for side in "ab")
    assert (step["edits"], step["misses"], a["source"], b["source"]) == ([], [], "a", "b")
    assert len(found["rows"]) == 35 and all(x is not None and y is not None for x, y in found["rows"])
    (entry,) = found["entries"]
    assert (entry["kind"], entry["channels"], entry["of"]) == ("pruned", [2, 5], 8)
    names = [a["nodes"][found["rows"][row][0]]["name"] for row in entry["rows"]]
    assert names == ["conv2d_3", "batch_norm_3", "conv2d_4"]
    conv = next(node for node in a["nodes"] if node["name"] == "conv2d_3")
    assert (conv["operator"], conv["path"], conv["value"]) == ("conv2d", "blocks.1.conv1", "float32[batch, 8, 8, 8]")
    assert conv["attributes"]["padding"] == "[1, 1]" and conv["macs"] == "36864*batch" and "nets.py" in conv["source"]
    assert found["cost"]["parameters"] == [5013, 5013 - 2 * (72 + 2 + 72)]


def test_histograms_count_every_element(pruned: GraphDiff) -> None:
    (found,) = data_of(pruned.to_html())["comparisons"]
    tensors = {row["a"]: row for row in found["tensors"]}
    low, high, a, b = tensors["blocks.1.conv1.weight"]["histogram"]
    assert (sum(a), sum(b)) == (8 * 8 * 9, 6 * 8 * 9) and low < 0 < high
    assert tensors["head.weight"]["relation"] == "equal"
    *_, a, b = tensors["head.weight"]["histogram"]
    assert sum(a) == 40 and b is None, "one is enough for both"


def test_a_weight_of_one_side_has_a_histogram_too() -> None:
    model = captured("resnet")
    data = data_of(go.diff(model, go.run(model, "fold-batch-norm")[0]).to_html())
    alone = [row for row in data["comparisons"][0]["tensors"] if row["relation"] == "alone"]
    assert {"stem.1.weight"} < {row.get("a") for row in alone} and any("b" in row for row in alone)
    assert all(row["histogram"] is None or row["histogram"][3] is None for row in alone)


def test_numbers_of_a_run_and_those_that_json_has_no_word_for() -> None:
    model = captured("resnet")
    broken = model.clone()
    with torch.no_grad():
        broken.params["blocks.2.conv1.weight"][0] = float("nan")
    found = go.diff(model, broken, run=True)
    (numbers,) = (one["numbers"] for one in data_of(found.to_html())["comparisons"])
    assert found.numbers is not None and found.numbers.first is not None
    assert numbers["first"] == found.numbers.first.a and len(numbers["errors"]) == len(found.numbers.profile)
    assert "infinite" in {error for _, error, _ in numbers["errors"]}


def test_the_same_page_every_time(pruned: GraphDiff) -> None:
    assert pruned.to_html() == pruned.to_html()


# Both graphs as one


def test_every_node_has_its_row_once() -> None:
    for first, second in (("resnet", "mobile"), ("mobile", "transformer"), ("branches", "branches")):
        diff = go.diff(captured(first), captured(second))
        rows = rows_of(diff)
        for side, numbers in (("a", [row.a for row in rows]), ("b", [row.b for row in rows])):
            view = getattr(diff, side).view
            drawn = [item.index for item in view.items if item.kind != "tensor"]
            assert Counter(number for number in numbers if number is not None) == Counter(drawn)
        pairs = {(row.a, row.b) for row in rows if row.a is not None and row.b is not None}
        assert pairs == {(pair.a, pair.b) for pair in diff.pairs}, "no two nets here have a block that moved"


def test_what_is_new_stands_behind_what_it_reads() -> None:
    found = between(lambda m, x: m.two(m.one(x)), lambda m, x: m.two(torch.tanh(torch.sigmoid(m.one(x)))))
    a, b = found.a.view, found.b.view
    names = [(row.a and a.items[row.a].operator, row.b and b.items[row.b].operator) for row in rows_of(found)]
    assert names[1:5] == [("linear", "linear"), (None, "sigmoid"), (None, "tanh"), ("linear", "linear")]


def test_what_has_moved_stands_in_both_places() -> None:
    found = between(
        lambda m, x: m.three(m.two(m.wide(m.one(x)).tanh()).relu()).sigmoid(),
        lambda m, x: m.three(m.wide(m.two(m.one(x).tanh()).relu())).sigmoid(),
    )
    (entry,) = found.entries
    ((pair,), rows) = (entry.pairs, rows_of(found))
    assert entry.kind == "moved" and Row(pair.a, None, ("wide",)) in rows and Row(None, pair.b, ("wide",)) in rows
    (one,) = data_of(found.to_html())["comparisons"]
    assert one["links"] == [[pair.a, pair.b]]
    assert [rows[place].path for place in one["entries"][0]["rows"]] == [("wide",), ("wide",)]


paths = st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=3).map(tuple), max_size=300)


@given(paths)
@settings(deadline=None, max_examples=60)
def test_groups_are_stretches_one_in_another(paths: list[tuple[str, ...]]) -> None:
    groups = groups_of([Row(place, place, path) for place, path in enumerate(paths)])
    for number, group in enumerate(groups):
        assert 0 <= group.first < group.last < len(paths)
        if group.parent is not None:
            outer = groups[group.parent]
            assert group.parent < number and outer.first <= group.first <= group.last <= outer.last
        if group.path:
            inside = tuple(group.path.split("."))
            assert all(path[: len(inside)] == inside for path in paths[group.first : group.last + 1])
    for parent in {None, *range(len(groups))}:
        children = [group for group in groups if group.parent == parent]
        assert all(one.last < two.first for one, two in pairwise(children))
        first, last = (0, len(paths) - 1) if parent is None else (groups[parent].first, groups[parent].last)
        assert last - first + 1 - sum(one.last - one.first for one in children) <= 60, "no group is too large to read"


def test_a_graph_without_modules_is_folded_too() -> None:
    groups = groups_of([Row(place, place, ()) for place in range(5000)])
    top = [group for group in groups if group.parent is None]
    assert [group.label for group in top] == ["part 1 of 4", "part 2 of 4", "part 3 of 4", "part 4 of 4"]
    inner = [group.last - group.first + 1 for group in groups if group.parent is not None]
    assert sum(inner) == 5000 and max(inner) <= 40 and min(inner) >= 38
    assert groups_of([Row(place, place, ()) for place in range(60)]) == []


# That it needs nothing else


def test_nothing_is_loaded(pruned: GraphDiff) -> None:
    page = pruned.to_html()
    markup = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page, flags=re.DOTALL)
    assert not re.search(r"\b(src|href|action|srcset)\s*=", markup) and "url(" not in markup and "@import" not in markup
    # The library's addresses of licences are comments; the worker names none but those of XML.
    own = "\n".join(path.read_text() for path in html._FOLDER.iterdir() if path.suffix in (".js", ".css", ".html"))
    assert set(re.findall(r"https?://[\w./]+", own)) == {"http://www.w3.org/2000/svg"}
    for word in (
        "fetch(",
        "XMLHttpRequest",
        "import(",
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
    ):
        assert word not in own, word


def test_the_policy_allows_what_is_written_into_the_page_and_nothing_else(pruned: GraphDiff) -> None:
    page = pruned.to_html()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["worker-src"] == "blob:"
    scripts = re.findall(r'<script(?: type="module")?>(.*?)</script>', page, flags=re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (*scripts, style)
    ]
    assert rules["script-src"].split() == hashes[:2] and rules["style-src"] == hashes[2]
    assert "unsafe" not in policy and "http" not in policy


def test_data_cannot_end_its_element() -> None:
    text = "</script><!--\u2028\u202e\x1b[2J\ud800&amp;{{policy}}"
    page = html_page({"title": text, "graphs": [], "comparisons": [], "steps": []})
    assert data_of(page)["title"] == text
    (line,) = [line for line in page.splitlines() if 'id="data"' in line]
    inner = line.removeprefix('<script type="application/json" id="data">').removesuffix("</script>")
    assert inner.isascii() and inner.isprintable() and not set("<>&") & set(inner)
    assert "{{policy}}" in inner, "what stands in the data is not filled in"


# The commands


def test_the_command_writes_a_page_beside_what_it_says(tmp_path: Path) -> None:
    model, page = captured("resnet"), tmp_path / "page.html"
    model.save(tmp_path / "a.gopt")
    go.run(model, "fold-batch-norm")[0].save(tmp_path / "b.gopt")
    result = graphopt("diff", tmp_path / "a.gopt", tmp_path / "b.gopt", "--html", page)
    assert result.exit_code == 1 and "9 rewritten" in result.stdout and f"wrote {page}" in result.stderr
    data = data_of(page.read_text())
    assert len(data["comparisons"][0]["entries"]) == 9 and data["graphs"][0]["source"] == str(tmp_path / "a.gopt")
    same = graphopt("diff", tmp_path / "a.gopt", tmp_path / "a.gopt", "--html", page, "--json")
    assert same.exit_code == 0 and json.loads(same.stdout)["same"]
    assert data_of(page.read_text())["comparisons"][0]["entries"] == [], "the page is replaced as a whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gopt", "b.gopt", "page.html"]


def test_places_that_no_page_can_be_written_to(tmp_path: Path) -> None:
    captured("branches").save(tmp_path / "a.gopt")
    files = (tmp_path / "a.gopt", tmp_path / "missing.gopt")
    (tmp_path / "folder.html").mkdir()
    refused(graphopt("diff", *files, "--html", tmp_path / "folder.html"), 2, "is a folder")
    before = files[0].read_bytes()
    refused(graphopt("diff", *files, "--html", files[0]), 2, "ends in .html")
    refused(graphopt("opt", files[0], "-o", tmp_path / "b.gopt", "--html", files[0]), 2, "ends in .html")
    assert files[0].read_bytes() == before and not (tmp_path / "b.gopt").exists()
    refused(graphopt("diff", *files, "--html", tmp_path / "no" / "page.html"), 2, "there is no folder")
    refused(graphopt("diff", *files, "--html", tmp_path / "page.html"), 2, "there is no file")
    assert not (tmp_path / "page.html").exists()


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: GraphDiff) -> None:
    monkeypatch.setattr(html, "_FOLDER", tmp_path)
    with pytest.raises(UsageError, match=r"elk-api.js and elk-worker.min.js") as caught:
        pruned.to_html()
    assert "make page" in str(caught.value)
    captured("branches").save(tmp_path / "a.gopt")
    source, page = tmp_path / "a.gopt", tmp_path / "page.html"
    refused(graphopt("diff", source, source, "--html", page), 2, "make page")
    refused(graphopt("opt", source, "-o", tmp_path / "b.gopt", "--html", page), 2, "make page")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gopt"]


class Folded(nn.Module):
    """A convolution that a batch norm folds into, and one whose result something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm, self.late = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(torch.relu(self.norm(self.one(x))))
        return self.late(y) + y


def test_the_page_of_a_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, page = go.capture(Folded().eval(), (torch.randn(2, 3, 8, 8),)), tmp_path / "page.html"
    model.save(tmp_path / "a.gopt")
    pipeline = "remove-identity,fold-batch-norm,dead-code"
    result = graphopt("opt", tmp_path / "a.gopt", "-p", pipeline, "-o", tmp_path / "b.gopt", "--html", page)
    assert result.exit_code == 0 and f"wrote {page}" in result.stderr, result.stderr
    data, (_, reports) = data_of(page.read_text()), go.run(model, pipeline)
    titles = [step["title"] for step in data["steps"]]
    assert titles == ["1. remove-identity", "2. fold-batch-norm", "3. dead-code", "the whole pipeline"]
    for step, report in zip(data["steps"], reports, strict=False):
        assert [edit["node"] for edit in step["edits"]] == [edit.node for edit in report.edits]
        assert {(miss["node"], miss["reason"]) for miss in step["misses"]} == {
            (m.node, m.reason) for m in report.misses
        }
    assert data["steps"][1]["edits"] and data["steps"][1]["misses"]
    kinds = [[e["kind"] for e in data["comparisons"][step["comparison"]]["entries"]] for step in data["steps"]]
    assert kinds == [[], ["rewritten"], [], ["rewritten"]]
    assert [graph["source"] for graph in data["graphs"]] == ["at first", "after 2. fold-batch-norm"]
