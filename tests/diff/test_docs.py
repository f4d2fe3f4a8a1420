"""What docs/diff.md shows is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import graphopt as go
from graphopt.tools.main import app
from tests.diff.nets import captured

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "diff.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, the same pruned, the same with other weights, and inputs; the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    model = captured("resnet")
    model.save("net.gopt")
    go.run(model, "remove-channels{layer=blocks.1.conv1,indices=1}")[0].save("small.gopt")
    tuned = model.clone()
    tuned.params["head.bias"].detach().add_(1)
    tuned.save("tuned.gopt")
    np.savez("x.npz", **{model.signature.tensor_inputs[0].name: np.ones((2, 3, 10, 10), np.float32)})
    return tmp_path


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in block("sh").strip().splitlines():
        words = shlex.split(line, comments=True)
        arguments = ["diff", *words[1:]] if words[0] == "graph-diff" else words[1:]
        with pytest.raises(SystemExit) as end:
            app(arguments)
        out, err = capsys.readouterr()
        assert end.value.code == (0 if "net.gopt net.gopt" in line or "--ignore weights" in line else 1), line + err
        assert out, line


def test_program() -> None:
    program = block("python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"  # (1 rewritten.*|rewritten.*)", program)
    assert done.stdout.splitlines() == said


def test_git(folder: Path) -> None:
    """The external diff and the difftool show the difference, and neither fails."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "graph-diff"
    script.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from graphopt.tools.main import graph_diff; graph_diff()" "$@"\n'
    )
    script.chmod(0o755)
    search = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(folder), "PATH": search, "PYTHONPATH": str(ROOT)}
    run = {"cwd": folder, "env": {**os.environ, **settings}, "text": True, "capture_output": True}

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, **run)
        return done.stdout

    git("init", "-q", ".")
    (folder / ".gitattributes").write_text(block("gitattributes"))
    git("add", ".gitattributes", "net.gopt")
    git("commit", "-qm", "first")
    (folder / "small.gopt").replace(folder / "net.gopt")
    git("commit", "-qam", "second")
    lines = [line.replace("net.onnx", "net.gopt") for line in block("sh-git").strip().splitlines()]
    for configure, show in (lines[:2], lines[2:]):
        subprocess.run(configure, shell=True, check=True, **run)
        done = subprocess.run(show, shell=True, check=True, **run)
        assert "lose 1 of 8 channels" in done.stdout, done.stdout + done.stderr


def test_every_key_is_described() -> None:
    model = captured("resnet")
    pruned, _ = go.run(model, "remove-channels{layer=blocks.1.conv1,indices=1}")
    found = go.diff(model, pruned, run=True, latency="reference").to_json(graph=True)
    table = PAGE[PAGE.index("## The JSON form") :]

    def keys(value: object, depth: int = 0) -> set[str]:
        if isinstance(value, list):
            return set().union(*(keys(part, depth) for part in value[:3])) if value else set()
        if not isinstance(value, dict):
            return set()
        own = {key for key in value if key.isidentifier() and depth != 99}
        skipped = {"names", "counts", "totals", "operators", "modules", "relations", "attributes"}
        return own.union(*(keys(part) for key, part in value.items() if key not in skipped))

    missing = {key for key in keys(json.loads(json.dumps(found))) if f"`{key}`" not in table}
    assert not missing - {"a", "b"}, missing
