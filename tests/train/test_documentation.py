"""The programs in docs/training.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.check import relative_error

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def run(number: int) -> dict[str, Any]:
    """What one of the page's programs defines."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(programs) == 2
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    exec(compile(programs[number], str(PAGE), "exec"), found)  # our own page
    return found


def test_the_program_prunes_trains_and_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(0)
    assert found["report"].cost_after.macs.subs("batch", 1) <= 0.5 * found["report"].cost_before.macs.subs("batch", 1)
    assert found["done"].losses[1] < found["done"].losses[0] and (tmp_path / "run.checkpoint").exists()
    assert sum(map(len, found["optimizer"].zeros().values())) == 20
    assert sum(found["removed"].findings["removed"].values()) > 0
    x = found["images"][0]
    assert torch.allclose(found["model"](x), found["smaller"](x), atol=1e-5)


def test_the_program_of_low_rank_finds_ranks_and_truncates() -> None:
    found = run(1)
    assert found["left"] == {} and found["maestro"].ranks() == {"0": 2, "2": 2}  # the teacher's
    ranks, x, y = found["dlrt"].ranks(), found["x"], found["y"]
    assert ranks["0"] == 2 and found["losses"][-1] < 2e-3 * found["losses"][0]
    error = (found["maestro_net"](x) - y).square().mean() / y.square().mean()
    assert float(error.detach()) < 0.1
    (row,) = found["cut"].findings["layers"]
    assert row["rank"] < row["of"] == ranks["2"] and relative_error(found["small"](x), found["model"](x)) < 0.1
