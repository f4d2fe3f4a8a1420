"""`graphopt search`: the table, JSON, the picture, what is written and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import graphopt as go
from graphopt.tools.search import parse_time
from tests.search.nets import PASSES, batches
from tests.tools.command import graphopt, output, refused

pytestmark = [pytest.mark.usefixtures("counted"), pytest.mark.filterwarnings("ignore:.*reads .* numbers")]

NET = "tests.search.nets:chain"
SPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    np.savez(path, input=batches()[0][0].numpy())
    return path


def asked(data: Path, *more: object) -> tuple[object, ...]:
    return "search", NET, "--calib", data, "--passes", PASSES, "--backend", "reference", "--trials", 4, *more


def test_best_is_written_and_its_text_makes_the_same_model(data: Path, tmp_path: Path) -> None:
    best, again, plot = tmp_path / "best.gopt", tmp_path / "again.gopt", tmp_path / "frontier.svg"
    found = output(*asked(data, "--goal", "latency=0.5", "-o", best, "--plot", plot, "--seed", 2))
    assert found["goals"] == {"latency": 0.5} and found["output"] == str(best) and len(found["trials"]) == 4
    assert found["best"]["found"]["latency"] <= 0.5 and found["verified"]["loss"] == found["best"]["found"]["loss"]
    done = graphopt("opt", NET, "-p", found["best"]["pipeline"], "--calib", data, "-o", again)
    assert done.exit_code == 0, done.stderr
    assert not go.diff(best, again).entries
    check_picture(plot, found["best"]["number"], sum(one["state"] == "complete" for one in found["trials"]))


def check_picture(plot: Path, best: int, complete: int) -> None:
    tree = ElementTree.fromstring(plot.read_text())
    dots = [dot for dot in tree.iter(f"{SPACE}circle") if dot.get("class") == "trial"]
    titles = [dot.findtext(f"{SPACE}title") or "" for dot in dots]
    assert len(dots) == complete and all("latency" in title and "{" in title for title in titles)
    assert [dot.get("fill") == "#1b7f4b" for dot in dots] == [title.startswith(f"trial {best}:") for title in titles]
    (goal,) = (line for line in tree.iter(f"{SPACE}line") if line.get("class") == "goal")
    assert goal.get("x1") == goal.get("x2") and 80 < float(goal.get("x1", "0")) < 80 + 640
    assert all(80 <= float(dot.get("cx", "0")) <= 720 and 90 <= float(dot.get("cy", "0")) <= 490 for dot in dots)
    assert len(list(tree.iter(f"{SPACE}path"))) == 1


def test_table_without_a_goal(data: Path) -> None:
    result = graphopt(*asked(data, "-v", "--evaluate", "tests.search.test_command:parameters"))
    assert result.exit_code == 0, result.stderr
    assert "4 trials (4 complete): all trials are done." in result.stdout and "Frontier" in result.stdout
    assert "prune-channels{macs=0.5,importance=taylor,step=4}" in result.stdout
    assert "1/4 trial 0: latency" in result.stderr and "nothing is kept" in result.stderr


def parameters(small: go.Model) -> float:
    return float(sum(tensor.numel() for tensor in small.params.values()))


def test_a_missed_goal_shows_what_there_is_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    best, plot = tmp_path / "best.gopt", tmp_path / "frontier.svg"
    more = ("--passes", "low-rank{macs=0.6..0.9}", "--trials", 2, "--goal", "latency=0.2", "-o", best, "--plot", plot)
    result = graphopt("search", NET, "--calib", data, "--backend", "reference", *more)
    assert result.exit_code == 1 and "Frontier" in result.stdout
    assert "error: the goal latency=0.2 was reached by none of 2 pipelines" in result.stderr
    assert "the nearest is trial 0 with latency 0.5" in result.stderr and "low-rank{macs=0.6}" in result.stderr
    assert plot.exists() and not best.exists()


def test_what_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(graphopt("search", NET), 2, "search needs calibration data", "--calib DATA.npz")
    refused(graphopt("search", NET, "--calib", data, "--passes", "low-rnk"), 2, "did you mean low-rank")
    refused(graphopt("search", NET, "--calib", data, "--goal", "latency"), 2, "'latency' is no goal")
    refused(graphopt("search", NET, "--calib", data, "--goal", "latncy=0.5"), 2, "did you mean latency")
    refused(graphopt("search", NET, "--calib", data, "--time", "soon"), 2, "'soon' is no time")
    refused(graphopt("search", NET, "--calib", data, "-o", tmp_path / "a.gopt"), 2, "without a goal")
    refused(graphopt("search", NET, "--calib", data, "--plot", tmp_path / "a.png"), 2, "ends in .svg")
    refused(graphopt("search", NET, "--calib", data, "--evaluate", "nowhere:loss"), 2, "no function 'nowhere:loss'")
    refused(graphopt("search", NET, "--calib", data, "--storage", "study.db"), 2, "sqlite:///study.db")
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused(graphopt("search", NET, "--calib", data), 2, "Optuna, which is not installed", "graphopt[search]")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("7", 7), ("2d", 172800)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds
