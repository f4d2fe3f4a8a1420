"""From template to a tested pass: the generated files run, are clean, and never overwrite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import UsageError
from graphopt.tools.new_pass import create

ROOT = Path(__file__).resolve().parents[2]


def checkout(folder: Path) -> Path:
    """A copy of what a new pass touches; the rest of the package is linked."""
    shutil.copytree(ROOT / "passes", folder / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "passes").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/compare.py", "tests/passes/apply.py"):
        shutil.copy(ROOT / name, folder / name)
    package = folder / "lib" / "graphopt"
    package.mkdir(parents=True)
    for entry in (ROOT / "graphopt").iterdir():
        (package / entry.name).symlink_to(entry)
    for name, home in (("passes", folder), ("backends", ROOT), ("tools", ROOT)):
        (package / name).symlink_to(home / name)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_template_runs_its_own_test(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    made = run(folder, "graphopt.tools.new_pass", "drop-sign")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("wrote passes/drop_sign.py and tests/passes/test_drop_sign.py\n")
    tested = run(folder, "pytest", "-q", "-p", "no:cacheprovider", "tests/passes/test_drop_sign.py")
    assert tested.returncode == 0 and "5 passed" in tested.stdout, tested.stdout + tested.stderr
    linted = run(folder, "ruff", "check", "--no-cache", "passes/drop_sign.py", "tests/passes/test_drop_sign.py")
    assert linted.returncode == 0, linted.stdout
    formatted = run(folder, "ruff", "format", "--no-cache", "--diff", "passes/drop_sign.py", "tests/passes")
    assert formatted.returncode == 0, formatted.stdout + formatted.stderr
    again = run(folder, "graphopt.tools.new_pass", "drop-sign")
    assert again.returncode == 2 and again.stderr.startswith("error: there is a pass 'drop-sign' already")


@pytest.mark.parametrize(
    "name", ["FoldTanh", "fold_tanh", "fold-", "-fold", "2fold", "fold--tanh", "", "import", "../x"]
)
def test_other_spellings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a pass"):
        create(name, checkout(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"), [("fold-batch-norm", "a pass"), ("exact", "a meaning"), ("repeat", "a meaning")]
)
def test_taken_names_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    folder = checkout(tmp_path)
    before = sorted(path.name for path in (folder / "passes").iterdir())
    with pytest.raises(UsageError, match=reason):
        create(name, folder)
    assert sorted(path.name for path in (folder / "passes").iterdir()) == before


def test_an_existing_test_is_not_overwritten(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    test = folder / "tests" / "passes" / "test_drop_sign.py"
    test.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        create("drop-sign", folder)
    assert test.read_text() == "mine" and not (folder / "passes" / "drop_sign.py").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no checkout"):
        create("drop-sign", tmp_path)
