"""`graphopt rank`: the table, JSON, the picture, and what is refused."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import graphopt as go
from tests.tools.command import graphopt, output, refused


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16)).eval()
    x = torch.randn(50, 3) @ torch.randn(3, 12)
    go.capture(net, (x,)).save(folder / "net.gopt")
    np.savez(folder / "calib.npz", input=x.numpy())
    return folder


def test_table_and_json(files: Path) -> None:
    result = graphopt("rank", files / "net.gopt", "--calib", files / "calib.npz")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "linear" in line]
    assert [(row[0], row[2:5], row[-3:]) for row in rows] == [
        ("0", ["16", "x", "12"], [rows[0][-3], "25", "%"]), ("1", ["16", "x", "16"], [rows[1][-3], rows[1][-2], "%"]),
    ]  # fmt: skip
    assert "2 layers; utilised directions hold 99 % of what a layer makes." in result.stdout
    found = output("rank", files / "net.gopt", "--calib", files / "calib.npz", "--energy", "0.9")
    assert (
        [row["layer"] for row in found["layers"]] == ["0", "1"] and found["energy"] == 0.9 and found["left_out"] == {}
    )
    assert 1 <= found["layers"][0]["utilised"] <= 3 and found["layers"][0]["rank"] == 12


def test_picture(files: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ranks.svg"
    result = graphopt("rank", files / "net.gopt", "--calib", files / "calib.npz", "--plot", picture)
    assert result.exit_code == 0 and f"wrote {picture}" in result.stderr
    tree = ElementTree.fromstring(picture.read_text())
    space = "{http://www.w3.org/2000/svg}"
    groups = tree.findall(f"{space}g")
    assert len(groups) == 2 and "utilised 3 of 12" in (groups[0].findtext(f"{space}title") or "")
    widths = [float(bar.get("width", "0")) for bar in groups[0].findall(f"{space}rect")]
    assert len(widths) == 4 and widths == sorted(widths, reverse=True) and widths[-1] == pytest.approx(520 * 3 / 12)


def test_what_is_refused(files: Path, tmp_path: Path) -> None:
    net, data = files / "net.gopt", files / "calib.npz"
    refused(graphopt("rank", net), 2, "rank needs calibration data", "--calib DATA.npz")
    refused(graphopt("rank", net, "--calib", data, "--energy", "2"), 2, "energy is 2")
    refused(graphopt("rank", net, "--calib", data, "--plot", tmp_path / "a.png"), 2, "ends in .svg")
    np.savez(tmp_path / "wrong.npz", other=np.zeros((50, 12), np.float32))
    refused(graphopt("rank", net, "--calib", tmp_path / "wrong.npz"), 2, "other")
