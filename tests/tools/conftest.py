"""A model file, inputs for it and a bundle, made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphopt as go
from tests.tools.command import NETS, graphopt


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.gopt"
    go.load(f"{NETS}:small").save(path)
    return path


@pytest.fixture(scope="session")
def x_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32))
    return path


@pytest.fixture(scope="session")
def bundle(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "bundle"
    result = graphopt("build", model_file, "-p", "fold-batch-norm", "-o", path, "--threads", "1")
    assert result.exit_code == 0, result.stderr
    return path
