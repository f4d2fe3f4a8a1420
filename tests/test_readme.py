"""Everything the README shows is run as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graphopt.tools.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_program_and_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands run in this process, which has imported torch and TVM already."""
    (program,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fold-batch-norm: batch_norm" in done.stdout and "torch.Size([5, 10])" in done.stdout
    assert (tmp_path / "net.gopt").exists() and (tmp_path / "net-cpu").is_dir()

    np.save(tmp_path / "x.npy", np.zeros((2, 3, 32, 32), np.float32))
    (commands,) = blocks("sh")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    for line in commands.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "graphopt"
        with pytest.raises(SystemExit) as end:
            app(words[1:])
        out, err = capsys.readouterr()
        assert end.value.code == 0, f"{line}\n{err}"
        assert out or err, line
    assert np.load(tmp_path / "y.npz")["output"].shape == (2, 10)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`((?:passes|tests|docs|benchmarks|tools)/[\w/]+\.\w+)`", text):
        if "fold_tanh" not in target:
            assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|    )make (\w[\w-]*)", README + (ROOT / "CONTRIBUTING.md").read_text())):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
