"""The program in docs/training.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_program_prunes_trains_and_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), found)  # our own page
    assert found["report"].cost_after.macs.subs("batch", 1) <= 0.5 * found["report"].cost_before.macs.subs("batch", 1)
    assert found["done"].losses[1] < found["done"].losses[0] and (tmp_path / "run.checkpoint").exists()
    assert sum(map(len, found["optimizer"].zeros().values())) == 20
    assert sum(found["removed"].findings["removed"].values()) > 0
    x = found["images"][0]
    assert torch.allclose(found["model"](x), found["smaller"](x), atol=1e-5)
