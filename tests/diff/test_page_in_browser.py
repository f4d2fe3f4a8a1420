"""The page in a real browser: what a person does with the mouse and with keys, and what is seen then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt as go
from benchmarks.diff_speed import edited
from benchmarks.long_graph import long_graph
from graphopt.diff.html import html_page
from graphopt.diff.steps import StepsPage
from tests.diff.browser import CHROMIUM, Page, browser
from tests.diff.nets import captured
from tests.tools.test_diff import HOSTILE, hostile

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium; .ci/run installs it where it can")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    model = captured("resnet")
    pruned = go.run(model, "remove-channels{layer=blocks.1.conv1,indices=2;5}")[0]
    (folder / "pruned.html").write_text(go.diff(model, pruned, names=("net", "pruned")).to_html())
    folded = go.run(model, "fold-batch-norm")[0]
    (folder / "folded.html").write_text(go.diff(model, folded, names=("net", "folded")).to_html())
    return folder


@pytest.fixture
def page(chromium: Page) -> Iterator[Page]:
    """The browser with nothing remembered; whatever a test did, there was no error and nothing was loaded."""
    chromium.errors.clear()
    chromium.loads.clear()
    chromium.look(width=1500, height=900, dark=False)
    yield chromium
    assert chromium.errors == []
    assert {load.partition(":")[0] for load in chromium.loads} <= {"file", "blob"}, chromium.loads


def details(page: Page) -> str:
    return str(page.value("document.getElementById('details').innerText"))


def node(name: str, side: str = "a") -> str:
    """The selector of the node that shows this name beside its operator, in one of the panels."""
    return f".panel.{side} [data-id={json.dumps(NODES[name])}]"


NODES: dict[str, str] = {}


def find_nodes(page: Page) -> None:
    """Note where every named node stands, from the data of the page."""
    rows: list[tuple[str, str]] = page.value(
        "(() => {const d = JSON.parse(document.getElementById('data').textContent), c = d.comparisons.at(-1);"
        "return c.rows.map(([a, b], n) =>"
        " [(a === null ? d.graphs[c.b].nodes[b] : d.graphs[c.a].nodes[a]).name, 'r' + n])})()"
    )
    NODES.clear()
    NODES.update(dict(rows))


def drawn(page: Page, selector: str) -> int:
    return int(page.value(f"document.querySelectorAll({json.dumps(selector)}).length"))


def redrawn(page: Page, act: Any) -> None:
    """Do something that lays the graph out again, and wait for it."""
    before = page.value("document.documentElement.dataset.drawn")
    act()
    page.wait(f"document.documentElement.dataset.drawn !== '{before}'")


def test_it_opens_with_both_graphs_side_by_side(page: Page, pages: Path) -> None:
    page.open(pages / "pruned.html")
    assert page.value("document.title") == "graphopt diff: net and pruned"
    assert page.value("document.getElementById('status').textContent").startswith("1 pruned; 33 of 33 calls matched")
    for side in "ab":
        texts = page.value(f"[...document.querySelectorAll('.panel.{side} .operator')].map(t => t.textContent)")
        assert texts[0].startswith("input") and any(text.startswith("conv2d") for text in texts)
    boxes = page.value(
        "['a', 'b'].map(s => document.querySelector(`.panel.${s} .node`).getBoundingClientRect())"
        ".map(b => [b.left, b.top])"
    )
    assert boxes[0][1] == boxes[1][1] and boxes[0][0] < boxes[1][0], "matched nodes stand at one height"
    assert drawn(page, ".link") > 5


def test_a_click_shows_what_a_node_is(page: Page, pages: Path) -> None:
    page.open(pages / "pruned.html")
    find_nodes(page)
    assert "Both graphs" in details(page) and "36864" not in details(page)
    page.click(node("batch_norm"))
    text = details(page)
    assert text.startswith("batch_norm") and "stem.1" in text and "1e-05" in text and "nets.py" in text
    assert "What changed" not in text and "stem.1.running_mean" in text
    assert drawn(page, "#details .histogram") == 4 and drawn(page, "#details .outline") == 0
    page.press("Escape")
    assert "Both graphs" in details(page)


def test_keys_go_from_difference_to_difference(page: Page, pages: Path) -> None:
    page.open(pages / "pruned.html")
    find_nodes(page)
    page.press("n")
    page.wait("document.querySelector('.node.chosen')")
    text = details(page)
    assert "weight sliced: axis 0 8 -> 6, without 2, 5" in text and "float32[batch, 6, 8, 8]" in text
    assert "27648*batch" in text and "remove-channels" in text and drawn(page, "#details .outline") >= 1
    assert drawn(page, node("conv2d_3", "b") + ".pruned .mark.pruned") == 1
    assert drawn(page, "button.entry.current") == 1
    page.press("ArrowDown")
    page.wait(f"document.querySelector('.node.chosen').dataset.id === '{NODES['batch_norm_3']}'")
    page.press("ArrowUp")
    page.wait(f"document.querySelector('.node.chosen').dataset.id === '{NODES['conv2d_3']}'")


def test_a_search_finds_nodes_by_name_operator_module_and_weight(page: Page, pages: Path) -> None:
    page.open(pages / "pruned.html")
    find_nodes(page)
    for text, found in (("ADD_2", 1), ("add.T", 4), ("blocks.3", 7), ("head.bias", 1), ("no such thing", 0)):
        page.press("/")
        assert page.value("document.activeElement.id") == "search"
        page.type(text)
        page.wait(f"document.querySelector('#list h2').textContent.startsWith('{found} node')")
        if found:
            page.press("Enter")
            page.wait("document.querySelector('.node.chosen.found')")
        page.press("Escape")
        page.wait("document.querySelector('#list h2').textContent === '1 difference'")
    assert drawn(page, ".found") == 0
    redrawn(page, lambda: page.press("f"))
    page.press("/")
    page.type("blocks.3")
    page.wait("document.querySelectorAll('.folded.found').length === 2")  # the closed module, in both panels
    assert page.value("document.querySelector('.folded.found .operator').textContent") == "blocks"


def test_modules_are_folded_and_unfolded(page: Page, pages: Path) -> None:
    page.open(pages / "folded.html")
    everything = drawn(page, ".panel.a .node")
    redrawn(page, lambda: page.press("f"))
    labels = page.value("[...document.querySelectorAll('.panel.a .folded .operator')].map(t => t.textContent)")
    assert labels == ["stem", "blocks"] and drawn(page, ".panel.a .node") < everything
    values = page.value("['a', 'b'].map(s => document.querySelector(`.panel.${s} .folded .value`).textContent)")
    assert values == ["3 operators, then 2", "2 operators, was 3"]
    assert drawn(page, ".panel.a .folded .mark.rewritten") == 2
    redrawn(page, lambda: page.click(".panel.b .folded", times=2))
    assert page.value("[...document.querySelectorAll('.panel.b .box text')].map(t => t.textContent)") == ["stem"]
    assert "3 operators" not in details(page) and details(page).startswith("stem")
    redrawn(page, lambda: page.press("Enter"))
    assert drawn(page, ".box") == 0
    redrawn(page, lambda: page.press("u"))
    assert drawn(page, ".folded") == 0 and drawn(page, ".panel.a .box") > 2
    redrawn(page, lambda: page.press("f"))
    redrawn(page, lambda: page.press("p"))  # what is looked for is unfolded
    page.wait("document.querySelector('.node.chosen .mark')")


def test_help_names_every_key(page: Page, pages: Path) -> None:
    page.open(pages / "pruned.html")
    page.press("?")
    page.wait("document.getElementById('help').open")
    keys = page.value("[...document.querySelectorAll('#help kbd')].map(k => k.textContent)")
    assert {"/", "n", "p", "Enter", "Space", "f", "u", "t", "?", "Escape", "[", "]"} <= set(keys)
    assert len(keys) == len(set(keys)) and drawn(page, "#help .mark") == 8
    page.press("Escape")
    page.wait("!document.getElementById('help').open")


def test_light_and_dark(page: Page, pages: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.open(pages / "pruned.html")
    light = page.value(ground)
    page.look(width=1500, height=900, dark=True)
    dark = page.value(ground)
    assert light != dark
    page.press("t")
    assert page.value(ground) == light, "what the reader says goes before what the system says"
    page.press("t")
    assert page.value(ground) == dark
    page.press("t")


def test_names_that_mean_harm_are_text(page: Page, tmp_path: Path) -> None:
    files = hostile(tmp_path / "a.onnx", 1.0), hostile(tmp_path / "b.onnx", 2.0)
    name = f"{HOSTILE}</script><img src=x onerror=alert(1)>"
    found = go.diff(*files, names=(name, "b"))
    found.a.view.items[2].name = found.b.view.items[2].name = name
    found.a.view.items[2].path = f"{name}.{name}"
    (tmp_path / "page.html").write_text(found.to_html())
    page.open(tmp_path / "page.html")
    page.press("n")
    page.wait("document.querySelector('.node.chosen')")
    page.press("/")
    page.type("<script>")
    page.wait("document.querySelectorAll('button.entry').length")
    shown = page.value("document.body.innerText + [...document.querySelectorAll('svg text')].map(t => t.textContent)")
    assert "w\\x1b[2J<script>alert(1)</script>" in shown and "\\u202e" in shown
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert drawn(page, "img, b, nav script, aside script, svg script") == 0


def test_the_steps_of_a_pipeline(page: Page, tmp_path: Path) -> None:
    model = captured("resnet")
    steps = StepsPage("net", model)
    _, (first, second) = go.run(model, "remove-identity,fold-batch-norm", instruments=[steps])
    (tmp_path / "page.html").write_text(steps.page())
    page.open(tmp_path / "page.html")
    assert page.value("document.getElementById('step').selectedOptions[0].textContent") == "the whole pipeline"
    names = "[...document.querySelectorAll('#names span')].map(s => s.textContent)"
    assert page.value(names) == ["A  at first", "B  after 2. fold-batch-norm"]
    redrawn(page, lambda: page.press("["))
    assert (
        page.value("document.querySelector('.journal summary').textContent")
        == f"The pass made {len(second.edits)} edits"
    )
    redrawn(page, lambda: page.press("["))
    assert not first.edits and drawn(page, ".panel .node:is(.changed, .removed, .rewritten)") == 0
    redrawn(page, lambda: page.press("]"))
    assert second.edits and drawn(page, ".panel.a .rewritten .mark.removed") > 0


def test_an_empty_graph(page: Page, tmp_path: Path) -> None:
    class Same(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = go.capture(Same(), (torch.ones(2),))
    (tmp_path / "page.html").write_text(go.diff(model, model).to_html())
    page.open(tmp_path / "page.html")
    page.press("n")
    assert page.value("document.getElementById('status').textContent") == "there is no difference"
    (tmp_path / "none.html").write_text(html_page(EMPTY))
    page.open(tmp_path / "none.html")
    for key in ("n", "f", "u", "0", "ArrowDown", "Enter"):
        page.press(key)


EMPTY = {
    "title": "nothing",
    "graphs": [{"source": "a", "signature": "()", "history": [], "nodes": []}],
    "comparisons": [
        {"a": 0, "b": 0, "summary": "", "cost": {}, "numbers": None}
        | {name: [] for name in ("rows", "groups", "links", "entries", "changes", "tensors")}
    ],
    "steps": [{"title": "", "comparison": 0, "edits": [], "misses": []}],
}


def test_five_thousand_operators(page: Page, tmp_path: Path) -> None:
    model = long_graph(5000)
    found = go.diff(model, edited(model, 250)[0])
    (tmp_path / "page.html").write_text(found.to_html())
    page.open(tmp_path / "page.html")
    ready = int(page.value("document.documentElement.dataset.ready"))
    print(f"interactive after {ready} ms")
    assert ready < 10_000, f"interactive after {ready} ms; a reader waits 3000 at most"
    assert 0 < drawn(page, ".panel.a .node") < 400, "most of it is folded"
    page.press("n")
    page.wait("document.querySelector('.node.chosen')")
    page.press("/")
    name = list(found.a.view.calls())[2500].name
    page.type(name)
    page.press("Enter")
    page.wait("document.querySelector('.node.chosen.found')")
    assert name in details(page)
