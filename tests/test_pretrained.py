"""Trained PyTorch models from registry packages: what they say about real input survives the exact passes and TVM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import graphopt as go
from benchmarks import corpora
from benchmarks.efficientnet_lite import class_names, photo, pretrained
from benchmarks.torchvision_ops import define_missing
from tests.compare import relative_error

PHOTOS = {"coffee": "espresso", "chelsea": "tiger cat", "flower": "daisy", "china": "palace"}
PARAPHRASES = (
    ("A kitten is resting on the rug.", "A young cat sleeps on the carpet."),
    ("Shares fell sharply this afternoon.", "The stock market dropped steeply today."),
    ("She is baking bread in the oven.", "A woman bakes a loaf."),
)


@pytest.fixture(autouse=True)
def _offline() -> None:
    """Without the files, fail; skip where the network was forbidden."""
    try:
        for name in ("efficientnet-lite0", "imagenet-synsets", "imagenet-names", "minilm", *PHOTOS):
            corpora.path(name)
    except corpora.Unavailable as error:
        if corpora.offline():
            pytest.skip(str(error))
        raise


def test_efficientnet_lite_names_the_photos() -> None:
    net = pretrained()
    photos = torch.cat([photo(corpora.path(name)) for name in PHOTOS])
    model = go.capture(net, (photos[:2],), dynamic={"x": {0: "batch"}})
    exact, reports = go.run(model, "exact")
    assert sum(len(report.edits) for report in reports if report.name == "fold-batch-norm") == 49 * 3
    compiled = go.build(exact, target="cpu", backend="tvm", threads=1)
    with torch.no_grad():
        reference = net(photos)
        for call in (model, exact, compiled):
            output = call(photos)
            assert relative_error(output, reference) < 1e-5
            assert _labels(output) == list(PHOTOS.values())


def _labels(output: Tensor) -> list[str]:
    names = class_names()
    return [names[index] for index in output.argmax(1).tolist()]


def test_minilm_pairs_sentences_that_mean_the_same() -> None:
    define_missing()
    from transformers import AutoModel, AutoTokenizer

    folder = corpora.path("minilm").parent
    for part in ("minilm-config", "minilm-tokenizer", "minilm-tokenizer-config"):
        corpora.path(part)
    net = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    sentences = [sentence for pair in PARAPHRASES for sentence in pair]
    inputs = dict(
        AutoTokenizer.from_pretrained(folder, local_files_only=True)(sentences, padding=True, return_tensors="pt")
    )
    model = go.capture(net, (), inputs, dynamic={name: {0: "batch", 1: "length"} for name in inputs})
    exact, reports = go.run(model, "exact")
    merged = sum(len(report.edits) for report in reports if report.name == "merge-parallel-linear")
    assert merged == 6 * 3  # query, key and value of six layers
    with torch.no_grad():
        hidden = exact(**inputs).last_hidden_state
        assert relative_error(hidden, net(**inputs).last_hidden_state) < 1e-5
    alike = _similarities(hidden, inputs["attention_mask"])
    partners = [index ^ 1 for index in range(len(sentences))]
    assert alike.fill_diagonal_(-1).argmax(1).tolist() == partners
    shorter = {name: value[:3, :9] for name, value in inputs.items()}
    with torch.no_grad():
        assert relative_error(exact(**shorter)[0], net(**shorter)[0]) < 1e-5


def _similarities(hidden: Tensor, mask: Tensor) -> Tensor:
    """Cosines between the means of the hidden states of real tokens: [sentences, sentences]."""
    weights = mask[..., None]
    vectors = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)
    return vectors @ vectors.T
