"""What every test shares: seeds, one thread, and the verifier around every pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from graphopt import pipeline
from graphopt.verify import verify


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def _verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that goes into or comes out of `go.run` in a test is verified, whatever the pipeline itself does."""
    run = pipeline.run

    def verified_run(model, *args, **kwargs):
        verify(model)
        text = str(model)
        result, reports = run(model, *args, **kwargs)
        verify(result)
        assert str(model) == text, "the input model was changed"
        return result, reports

    monkeypatch.setattr(pipeline, "run", verified_run)
