"""Published models, compiled for ARM and run from a fresh folder in qemu's user mode without Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt as go
from benchmarks import corpora
from benchmarks.latency_models import OnnxSubject, Subject, build
from benchmarks.pages import orientation_input, page
from tests.bundle.cross import error_of, words_for

LIMIT = 1e-4


def page_orientation() -> Subject:
    return OnnxSubject(corpora.path("pp-lcnet"), (torch.from_numpy(orientation_input(page(3, 180))),))


MODELS: dict[str, Callable[[], Subject]] = {
    "pp-lcnet": page_orientation,
    "efficientnet-lite0": lambda: build("efficientnet_lite0", 1),
    "minilm": lambda: build("minilm_128", 1),
    "ppocr-v6-rec": lambda: build("ppocr_rec_320", 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_on_arm(name: str, tmp_path: Path) -> None:
    words_for("cortex-a72")  # nothing is fetched where it cannot run
    try:
        subject = MODELS[name]()
    except corpora.Unavailable as error:
        if corpora.offline():
            pytest.skip(str(error))
        raise
    model, _ = go.run(subject.capture(), "exact")
    assert error_of(model, "cortex-a72", list(subject.args), tmp_path) < LIMIT
    weights = tmp_path / "fresh" / "weights.bin"
    assert weights.exists() == (name in ("minilm", "efficientnet-lite0", "ppocr-v6-rec"))
