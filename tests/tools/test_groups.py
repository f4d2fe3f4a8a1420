"""`graphopt groups`: tables, JSON, and what they say of a model that can lose nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.tools.command import NETS, graphopt, output, refused


def test_tables_name_groups_and_reasons() -> None:
    result = graphopt("groups", f"{NETS}:small")
    assert result.exit_code == 0
    assert "1 group; units are removed as a whole" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["0", "8", "7", "3,136"] in lines
    assert any(line[:2] == ["6", "10"] and "output" in line for line in lines), result.stdout


def test_json_lists_every_axis_that_is_cut() -> None:
    found = output("groups", f"{NETS}:small")
    (group,) = found["groups"]
    assert (group["name"], group["families"]) == ("0", [8])
    cut = {(row["tensor"], row["axis"]): (row["role"], row["positions"], row["of"]) for row in group["members"]}
    assert cut["0.weight", 0] == ("out", 8, 8) and cut["1.running_var", 0] == ("scale", 8, 8)
    assert cut["6.weight", 1] == ("in", 288, 288)
    assert found["pinned"] == [{"name": "6", "size": 10, "reasons": ["'linear' in 6 is an output"]}]


def test_the_page_lights_up_what_a_group_is_made_of(tmp_path: Path) -> None:
    page = tmp_path / "groups.html"
    result = graphopt("groups", f"{NETS}:small", "--html", page)
    assert result.exit_code == 0 and "groups.html" in result.stderr
    text = page.read_text()
    rows = re.findall(r'<g id="r(\d+)">.*?<text [^>]*>(\w+)', text)
    assert [name for _, name in rows][:2] == ["conv2d", "batch_norm"]
    data = json.loads(re.search(r"const data = (.*);", text).group(1))
    (group,) = data["groups"]
    lit = [name for number, name in rows if int(number) in group["rows"]]
    assert lit == ["conv2d", "batch_norm", "relu", "relu", "dropout", "flatten", "linear"]
    assert data["stays"][0]["name"] == "6"
    assert "http" not in text


def test_the_page_is_not_written_over_a_folder(tmp_path: Path) -> None:
    refused(graphopt("groups", f"{NETS}:small", "--html", tmp_path), 2, "is a folder")


def test_an_unknown_operator_is_named() -> None:
    result = graphopt("groups", f"{NETS}:unknown")
    assert result.exit_code == 0 and "0 groups" in result.stdout


def test_opt_prunes_and_reports(tmp_path: Path) -> None:
    found = output("opt", f"{NETS}:small", "-p", "prune-channels{params=0.5}", "-o", f"{tmp_path}/small.gopt")
    (report,) = found["reports"]
    assert report["findings"]["achieved"]["params"] <= 0.5
    assert found["cost_after"]["parameters"] <= 0.5 * found["cost_before"]["parameters"]
    assert report["findings"]["groups"][0]["group"] == "0"


def test_opt_shows_what_was_reached(tmp_path: Path) -> None:
    result = graphopt("opt", f"{NETS}:small", "-p", "prune-channels{params=0.5}", "-o", f"{tmp_path}/small.gopt")
    assert result.exit_code == 0
    assert "prune-channels: budget params 0.5" in result.stdout
    assert "prune-channels: importance magnitude" in result.stdout
    assert ["0", "8", "3"] in [line.split() for line in result.stdout.splitlines()]
