"""The models of the latency benchmark: fixed inputs, and each form that an engine wants the model in.

Image nets of torchvision have seeded random weights and calibrated batch norms, so that they compute what trained
ones do; EfficientNet-Lite0, MiniLM and the two PP-OCR nets have their published weights, out of registry packages.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt as go
from benchmarks import corpora
from benchmarks.lively import calibrate, enliven
from benchmarks.torchvision_ops import define_missing

__all__ = ["MODELS", "MORE", "NAMES", "OnnxSubject", "Subject", "TorchSubject", "build"]

RESOLUTION = 224
TOKENS = 128
CALIBRATION_BATCH = 4


class Subject(ABC):
    """A model with inputs of one batch size."""

    args: tuple[Tensor, ...]

    @abstractmethod
    def capture(self, *, free_batch: bool = False) -> go.Model:
        """The model as graphopt reads it, with the sizes of `args` or with a free batch."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module that eager PyTorch and TorchInductor run."""

    @abstractmethod
    def write_onnx(self, folder: Path) -> Path:
        """An ONNX file with the sizes of `args`."""


class TorchSubject(Subject):
    """A module in eval mode."""

    def __init__(self, net: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.net, self.args = net.eval(), args

    def capture(self, *, free_batch: bool = False) -> go.Model:
        dynamic: dict[str | int, Any] | None = None
        if free_batch:
            dynamic = {position: {0: "batch"} for position in range(len(self.args))}
        return go.capture(self.net, self.args, dynamic=dynamic)

    @property
    def module(self) -> nn.Module:
        return self.net

    def write_onnx(self, folder: Path) -> Path:
        path = folder / "model.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about opset conversions nobody asked for
            torch.onnx.export(self.net, self.args, str(path), dynamo=True, verbose=False)
        return path


class OnnxSubject(Subject):
    """An ONNX file with one input, an image of which only the channels are fixed."""

    def __init__(self, path: Path, args: tuple[Tensor]) -> None:
        self.path, self.args = path, args

    def capture(self, *, free_batch: bool = False) -> go.Model:
        import onnx

        from graphopt.frontends.onnx import load_onnx

        (value,) = onnx.load(self.path, load_external_data=False).graph.input
        named = zip(value.type.tensor_type.shape.dim, self.args[0].shape, strict=True)
        # graphopt calls a free dim as the file does, made into a Python name.
        sizes = {re.sub(r"\W", "_", dim.dim_param): size for dim, size in list(named)[free_batch:] if dim.dim_param}
        return load_onnx(self.path, sizes=sizes)

    @cached_property
    def module(self) -> nn.Module:
        return self.capture().module

    def write_onnx(self, folder: Path) -> Path:
        import onnx

        model = onnx.load(self.path)
        (value,) = model.graph.input
        for dim, size in zip(value.type.tensor_type.shape.dim, self.args[0].shape, strict=True):
            dim.dim_value = size
        path = folder / "model.onnx"
        onnx.save(model, path)
        return path


class MiniLM(nn.Module):
    """A sentence encoder up to its last hidden state, of which the sentence's vector is the mean."""

    def __init__(self, folder: Path) -> None:
        define_missing()
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        hidden: Tensor = encoded.last_hidden_state
        return hidden


def _images(batch: int, height: int = RESOLUTION, width: int = RESOLUTION, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _torchvision(name: str, batch: int) -> Subject:
    define_missing()
    import torchvision

    torch.manual_seed(0)
    return _lively(torchvision.models.get_model(name, weights=None), batch)


def _deit_tiny(batch: int) -> Subject:
    define_missing()
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(RESOLUTION, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    return _lively(net, batch)


def _lively(net: nn.Module, batch: int) -> Subject:
    with torch.no_grad():
        enliven(net)
        calibrate(net, [(_images(CALIBRATION_BATCH, seed=1),)])
    return TorchSubject(net, (_images(batch),))


def _efficientnet_lite0(batch: int) -> Subject:
    from benchmarks.efficientnet_lite import pretrained

    return TorchSubject(pretrained(), (_images(batch),))


def _minilm(batch: int) -> Subject:
    """Random tokens, all of them to be attended to."""
    corpora.path("minilm-config")
    net = MiniLM(corpora.path("minilm").parent)
    shape, words = (batch, TOKENS), int(net.encoder.config.vocab_size)
    tokens = torch.randint(words, shape, generator=torch.Generator().manual_seed(0))
    return TorchSubject(net, (tokens, torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)))


def _ppocr(corpus: str, height: int, width: int, batch: int) -> Subject:
    return OnnxSubject(corpora.path(corpus), (_images(batch, height, width),))


TORCHVISION = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "squeezenet1_1",
    "densenet121",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
)
MODELS: dict[str, Callable[[int], Subject]] = {
    **{name: partial(_torchvision, name) for name in TORCHVISION},
    "deit_tiny": _deit_tiny,
    "efficientnet_lite0": _efficientnet_lite0,
    "minilm_128": _minilm,
    "ppocr_det_640": partial(_ppocr, "ppocr-v6-det", 640, 640),
    "ppocr_rec_320": partial(_ppocr, "ppocr-v6-rec", 48, 320),
}
"""Name -> its maker, which takes the batch size."""
NAMES = tuple(MODELS)

MORE = {name: partial(_torchvision, name) for name in ("resnet34", "vgg11", "mnasnet1_0", "googlenet")}
"""Models that are not in the benchmark of latency but in others."""


def build(name: str, batch: int) -> Subject:
    """The model called `name`, the same every time. Raises `corpora.Unavailable`."""
    return {**MODELS, **MORE}[name](batch)
