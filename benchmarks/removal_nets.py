"""Nets whose every group is removed by `benchmarks.removals`: image and language nets with random weights that behave
like trained ones, in float64, and files with published weights, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import graphopt as go
from benchmarks import corpora
from benchmarks.latency_models import OnnxSubject
from benchmarks.latency_models import build as build_published
from benchmarks.lively import calibrate, enliven
from benchmarks.torchvision_ops import define_missing
from graphopt.model import Model

__all__ = ["MODELS", "image_net", "language_net"]

IMAGE_NETS = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "squeezenet1_1",
    "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf",
    "convnext_tiny", "googlenet", "inception_v3", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip
RESOLUTION = 224
CALIBRATION_BATCH = 4
VOCABULARY, TOKENS = 1000, 24


def image_net(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A net of torchvision at its resolution."""
    define_missing()
    import torchvision

    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "inception_v3":
        options["aux_logits"] = False
    size = 299 if name == "inception_v3" else RESOLUTION
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, **options).to(dtype)
    return _capture(net, torch.randn(CALIBRATION_BATCH, 3, size, size, dtype=dtype))


def _capture(net: nn.Module, samples: Tensor) -> Model:
    """The net in eval mode, its statistics those of the samples, captured with the first of them."""
    with torch.no_grad():
        enliven(net)
        calibrate(net, [(samples,)])
    return go.capture(net, (samples[:1],))


def language_net(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """Widths and heads as published, a small vocabulary and a few layers."""
    define_missing()
    import transformers

    made = {
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(vocab_size=VOCABULARY, num_hidden_layers=4, attn_implementation="sdpa")
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCABULARY, n_layer=4, use_cache=False, bos_token_id=0, eos_token_id=0)
        ),
        "llama_14_2": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=4,
                num_attention_heads=14,
                num_key_value_heads=2,
                use_cache=False,
            )
        ),
        "mixtral_2_experts": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=VOCABULARY,
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                num_local_experts=2,
                use_cache=False,
            )
        ),
    }
    torch.manual_seed(0)
    return _capture(made[name]().to(dtype), torch.randint(VOCABULARY, (CALIBRATION_BATCH, TOKENS)))


def llama_of_a_billion() -> Model:
    """1.2 billion parameters without data: only the groups are looked for."""
    define_missing()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config).eval()
    return go.capture(net, (torch.zeros(1, 8, dtype=torch.long, device="meta"),))


def image_file(corpus: str, *shape: int) -> Model:
    """An ONNX file with one input, at this shape."""
    return OnnxSubject(corpora.path(corpus), (torch.zeros(shape),)).capture()


def declared(corpus: str) -> Model:
    """An ONNX file with the sizes that it declares."""
    return go.load(corpora.path(corpus))


def published(name: str) -> Model:
    """A module with published weights."""
    return build_published(name, 1).capture()


IMAGE_FILES = {
    "pp-lcnet": (1, 3, 224, 224),
    "ppocr-v6-rec": (1, 3, 48, 320),
    "ppocr-v6-det": (1, 3, 320, 320),
    "ppocr-v3-rec-en": (1, 3, 48, 320),
    "ppocr-v3-rec-ch": (1, 3, 48, 320),
    "ppocr-v3-det": (1, 3, 320, 320),
    "ppocr-v2-cls": (1, 3, 48, 192),
}
DECLARED = ("centerface", "silero-vad-sequence", "silero-vad-step")

MODELS: dict[str, Callable[[], Model]] = {
    **{name: partial(image_net, name) for name in IMAGE_NETS},
    **{name: partial(language_net, name) for name in ("bert", "gpt2", "llama_14_2", "mixtral_2_experts")},
    **{name: partial(published, name) for name in ("efficientnet_lite0", "minilm_128")},
    **{name: partial(image_file, name, *shape) for name, shape in IMAGE_FILES.items()},
    **{name: partial(declared, name) for name in DECLARED},
    "llama_1b_meta": llama_of_a_billion,
}
