"""`graphopt repro`: what a failed pass leaves behind fails again in the same way, and says so when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.errors import GraphoptError
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.rewriter import Rewriter
from tests.tools.command import NETS, graphopt, output, refused

aten = torch.ops.aten
PASSES = "remove-identity,fold-batch-norm"


def fail(self: object, rw: Rewriter) -> None:
    (relu,) = rw.find(aten.relu.default)
    raise GraphoptError(f"no rule for {relu.name}", where="the activation", why="for the test")


def spoil(self: object, rw: Rewriter) -> None:
    (conv,) = rw.find(aten.conv2d.default)
    rw.update(conv, "for the test", stride=[2, 2], padding=[8, 8], dilation=[8, 8])


def double(self: object, rw: Rewriter) -> None:
    (conv,) = rw.find(aten.conv2d.default)
    weight = rw.argument(conv, "weight")
    rw.set_tensor(weight, rw.params[str(weight.target)] * 2, "for the test")


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reproducer of a run in which the second pass failed."""
    monkeypatch.setattr(FoldBatchNorm, "run", fail)
    return leave(tmp_path)


def leave(folder: Path, *options: str) -> Path:
    out = ("-o", folder / "out.gopt", "--repro", folder / "failure")
    result = graphopt("opt", f"{NETS}:small", "-p", PASSES, *out, *options)
    assert result.exit_code == 1 and "graphopt repro" in result.stderr
    return folder / "failure"


def facts(left: Path, **changes: Any) -> None:
    path = left / "repro.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_same_error_again(left: Path) -> None:
    message = refused(graphopt("repro", left), 1, "'fold-batch-norm' failed: no rule for relu", "the activation")
    assert "after remove-identity" in message and "for the test" in message
    assert "when the reproducer was written" not in message
    assert sorted(path.name for path in left.iterdir()) == ["model.gopt", "repro.json"]


@pytest.mark.parametrize(("run", "words"), [(spoil, "I3|I4|cannot"), (double, "differ|error")])
def test_a_pass_that_breaks_the_graph_or_the_numbers(
    run: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FoldBatchNorm, "run", run)
    folder = leave(tmp_path)
    recorded = json.loads((folder / "repro.json").read_text())
    message = refused(graphopt("repro", folder), 1, "'fold-batch-norm' failed")
    assert any(word in message for word in words.split("|")), message
    assert recorded["check"] is True and recorded["limit"] is None and recorded["error"]


def test_options_of_the_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoldBatchNorm, "run", fail)
    folder = leave(tmp_path, "--no-check", "--limit", "7")
    recorded = json.loads((folder / "repro.json").read_text())
    assert recorded["check"] is False and recorded["limit"] == 7
    monkeypatch.setattr(FoldBatchNorm, "run", double)
    found = output("repro", folder)
    assert [row["check"] for row in found["reports"]] == [None, None] and len(found["reports"][1]["edits"]) == 1


def test_another_error_is_told_apart(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoldBatchNorm, "run", double)
    refused(graphopt("repro", left), 1, "when the reproducer was written it was: no rule for relu")
    error = json.loads(graphopt("repro", left, "--json").stderr)
    assert error["exit_code"] == 1 and "no rule for relu" in error["why"]


def test_a_failure_that_is_repaired(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = graphopt("repro", left)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{PASSES}: 2 runs of passes, and none fails\nit was: no rule for relu\n"
    assert not result.stderr
    found = output("repro", left)
    assert found["recorded"] == "no rule for relu" and [row["pass"] for row in found["reports"]] == PASSES.split(",")


def test_other_versions_are_told(left: Path) -> None:
    facts(left, versions={"graphopt": "0.0.1", "torch": torch.__version__})
    result = graphopt("repro", left)
    assert result.exit_code == 1 and result.stderr.startswith("it was written with graphopt 0.0.1\n")
    assert json.loads(graphopt("repro", left, "--json").stderr)["what"].endswith("no rule for relu")


def test_what_is_no_reproducer(left: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "missing", tmp_path, left / "repro.json"):
        refused(graphopt("repro", place), 2, f"'{place}' is no reproducer", "--repro")
    refused(graphopt("repro"), 2, "DIR")


@pytest.mark.parametrize("damage", ["text", "list", "fields", "limit", "no model", "model", "pass"])
def test_damaged_reproducers(damage: str, left: Path) -> None:
    words = "is damaged"
    if damage == "text":
        (left / "repro.json").write_text("{")
    elif damage == "list":
        (left / "repro.json").write_text("[]")
    elif damage == "fields":
        (left / "repro.json").write_text(json.dumps({"pipeline": PASSES}))
    elif damage == "limit":
        facts(left, limit="many")
    elif damage == "pass":
        facts(left, pipeline="fold-bn")
        words = "there is no pass 'fold-bn'"
    elif damage == "model":
        (left / "model.gopt").write_text("nothing")
        words = "model.gopt"
    else:
        (left / "model.gopt").unlink()
        words = "model.gopt"
    refused(graphopt("repro", left), 2, words)
