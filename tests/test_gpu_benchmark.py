"""The tables of docs/gpu.md are the ones that were measured, and what the benchmarks import exists."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

from benchmarks.gpu_table import PAGE, RESULTS, page

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_page_has_what_was_measured() -> None:
    results = json.loads(RESULTS.read_text())
    assert page(results) in PAGE.read_text(), "run: python -m benchmarks.gpu_table"


def test_all_that_was_measured_was_right() -> None:
    results = json.loads(RESULTS.read_text())
    assert len(results["cases"]) >= 12 and all(case["right"] for case in results["cases"].values())
    assert len(results["checks"]) >= 80 and all(check["right"] for check in results["checks"].values())


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.py")), ids=lambda file: str(file.stem))
def test_what_a_benchmark_imports_of_the_package_exists(file: Path) -> None:
    """Most benchmarks take too long, or need too much, to be run by a test."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "graphopt":
            module = importlib.import_module(str(node.module))
            missing = [name.name for name in node.names if not _has(module, name.name)]
            assert not missing, f"{file.name}, line {node.lineno}: {node.module} has no {', '.join(missing)}"


def _has(module: object, name: str) -> bool:
    if hasattr(module, name):
        return True
    try:
        importlib.import_module(f"{module.__name__}.{name}")  # type: ignore[attr-defined]  # of a module
    except ImportError:
        return False
    return True
