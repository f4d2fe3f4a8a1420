"""The models of the GPU benchmark, with weights that two machines make alike, and their inputs.

The machine that compiles and the machine with the GPU are not the same, and need not have the same versions of torch.
So weights are not drawn by torch: each is computed from its name by numpy's counter-based generator, in 6 steps
between two bounds, which every machine rounds alike, and which compress well on their way.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.torchvision_ops import define_missing

__all__ = ["MODELS", "Case", "buffers_of", "inputs", "make", "with_buffers"]

RESOLUTION, TOKENS, WORDS = 224, 128, 30522
LEVELS = 6


@dataclass(frozen=True)
class Case:
    """A model in a precision and with a batch size."""

    model: str
    dtype: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.dtype}-b{self.batch}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class MiniLM(nn.Module):
    """The architecture of all-MiniLM-L6-v2 up to its last hidden state."""

    def __init__(self) -> None:
        define_missing()
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
        self.encoder = BertModel(BertConfig(vocab_size=WORDS, **sizes), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        hidden: Tensor = encoded.last_hidden_state
        return hidden


def _torchvision(name: str) -> nn.Module:
    define_missing()
    import torchvision

    net: nn.Module = torchvision.models.get_model(name, weights=None)
    return net


def _deit_tiny() -> nn.Module:
    define_missing()
    from torchvision.models import VisionTransformer

    net: nn.Module = VisionTransformer(
        RESOLUTION, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    return net


MODELS = {
    "resnet18": lambda: _torchvision("resnet18"),
    "mobilenet_v2": lambda: _torchvision("mobilenet_v2"),
    "deit_tiny": _deit_tiny,
    "minilm_128": MiniLM,
}


def make(name: str) -> nn.Module:
    """The float32 model in eval mode; batch norms have the statistics that they were made with."""
    net = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.copy_(torch.from_numpy(_values(key, tuple(parameter.shape))))
    return net


def _values(key: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Weights by He's rule (arXiv:1502.01852), scales about one and shifts about zero."""
    levels = _generator(key).integers(LEVELS, size=shape)
    between = ((levels * 2 - (LEVELS - 1)) / (LEVELS - 1)).astype(np.float32)
    if len(shape) == 1:
        return between * np.float32(0.25) + np.float32(key.endswith("weight"))
    if "embed" in key:
        return between
    return between * np.float32(math.sqrt(3 / math.prod(shape[1:])))


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(zlib.crc32(key.encode())))


def inputs(case: Case) -> tuple[Tensor, ...]:
    """The arguments of a case, on the CPU."""
    drawn = _generator(f"input of {case.model}")
    if case.model.startswith("minilm"):
        shape = (case.batch, TOKENS)
        tokens = torch.from_numpy(drawn.integers(WORDS, size=shape))
        return tokens, torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    image = drawn.random((case.batch, 3, RESOLUTION, RESOLUTION), dtype=np.float32) * 2 - 1
    return (torch.from_numpy(image).to(case.torch_dtype),)


def buffers_of(net: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """Running statistics, which come from a calibration on one machine."""
    return {key: buffer.numpy() for key, buffer in net.named_buffers() if key.rpartition(".")[2].startswith("running")}


def with_buffers(net: nn.Module, values: Mapping[str, np.ndarray[Any, Any]]) -> nn.Module:
    known = dict(net.named_buffers())
    for key, value in values.items():
        known[key].copy_(torch.from_numpy(value))
    return net
