"""What `graphopt build` refuses before it reads a model: threads and targets that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.target import Target
from tests.tools.command import graphopt, refused


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to write to, which the test leaves empty."""
    place = tmp_path / "out"
    place.mkdir()
    yield place
    assert not list(place.iterdir()), "something was written"


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**20])
def test_numbers_of_threads_that_are_none(threads: int, folder: Path) -> None:
    """Refused before anything is read: the model that is named does not exist."""
    for command in (("build", "none.onnx", "-o", folder / "bundle"), ("bench", "none.onnx")):
        message = refused(graphopt(*command, "--threads", threads), 2, f"on {threads} threads", "from 1 to 1024")
        assert "--threads" in message
    refused(graphopt("build", "none.onnx", "-o", folder / "bundle", "--threads", "two"), 2, "--threads", "integer")


def test_a_target_of_too_many_cores(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    path.write_text(json.dumps(Target.parse("cpu").to_json() | {"cores": 5000}))
    refused(
        graphopt("build", "none.onnx", "-o", folder / "bundle", "--target", path), 2, "on 5000 threads", "many.json"
    )


@pytest.mark.parametrize(
    ("preset", "changes", "texts"),
    [
        ("x86-64-v3", {"cpu": "skylake-avx51"}, ("unknown CPU 'skylake-avx51' of x86_64", "skylake-avx512")),
        ("cortex-a72", {"features": ["dotprd"]}, ("unknown feature 'dotprd' of aarch64", "dotprod")),
    ],
)
def test_targets_that_do_not_exist(
    preset: str, changes: dict[str, object], texts: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "target.json"
    path.write_text(json.dumps(Target.parse(preset).to_json() | changes))
    refused(graphopt("build", "none.onnx", "-o", folder / "bundle", "--target", path), 2, *texts)
