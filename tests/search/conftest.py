"""Latencies that are counted and not measured, so that a search of a test takes seconds and has one outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.search import judge
from tests.search.nets import CountedLatency


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(judge, "Deployed", CountedLatency)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
