"""Known architectures with random weights that behave like trained ones.

Every net is built with seeded weights, no parameter is left constant (zeros and ones hide mistakes), and
batch norms have the statistics of data that went through them, so outputs are of ordinary size, differ
between samples, and depend on every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.lively import calibrate, enliven
from benchmarks.torchvision_ops import define_missing

__all__ = ["NAMES", "ZooNet", "build", "calibrate", "enliven"]

define_missing()

CALIBRATION_BATCHES = 3


@dataclass(frozen=True)
class ZooNet:
    """A net in eval mode, a maker of its inputs, and which of their axes may vary."""

    name: str
    module: nn.Module
    make_args: Callable[[int, torch.Generator], tuple[Any, ...]]
    dynamic: dict[str, dict[int, str]]

    def args(self, batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
        """Example inputs of `batch` samples."""
        return self.make_args(batch, torch.Generator().manual_seed(seed))


def build(name: str) -> ZooNet:
    """The net called `name`, the same every time."""
    net = _image_net(name, IMAGE_NETS[name]) if name in IMAGE_NETS else _text_or_patch_net(name)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        enliven(net.module)
        calibrate(net.module, [net.args(8, seed) for seed in range(1, 1 + CALIBRATION_BATCHES)])
        _assert_sane(name, net.module(*net.args()))
    return net


def _assert_sane(name: str, output: Any) -> None:
    """Outputs that are tiny, huge or the same for every input would make a comparison worthless."""
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    largest = max(float(tensor.abs().max()) for tensor in tensors)
    spread = max(float((tensor[0] - tensor[1]).abs().max()) for tensor in tensors) / largest
    assert 1e-3 <= largest <= 1e3, f"{name}: outputs reach {largest:g}"
    assert spread > 0.05, f"{name}: two samples differ by {spread:.0%} of the largest output"


# Image nets of torchvision: the resolution, and options of the builder.
IMAGE_NETS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "vgg11_bn": (64, {}),
    "resnet18": (64, {}),
    "resnext50_32x4d": (64, {}),
    "wide_resnet50_2": (64, {}),
    "densenet121": (64, {}),
    "squeezenet1_1": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "shufflenet_v2_x1_0": (64, {}),
    "mnasnet0_5": (64, {}),
    "efficientnet_b0": (64, {}),
    "regnet_y_400mf": (64, {}),
    "convnext_tiny": (64, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (96, {"init_weights": False, "aux_logits": False}),
    "vit_b_16": (64, {"image_size": 64}),
    "swin_t": (96, {}),
}
TEXT_AND_PATCH_NETS = ("bert", "gpt2", "llama", "vit")
NAMES = (*IMAGE_NETS, *TEXT_AND_PATCH_NETS)


def _image_net(name: str, row: tuple[int, dict[str, Any]]) -> ZooNet:
    import torchvision

    size, options = row
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, **options)
        if name in ("alexnet", "vgg11_bn"):
            _narrow_classifier(module.classifier)

    def images(batch: int, generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(batch, 3, size, size, generator=generator),)

    return ZooNet(name, module.eval(), images, {"x": {0: "batch"}})


def _narrow_classifier(classifier: nn.Sequential, width: int = 256) -> None:
    """Fewer hidden units: as published, these classifiers are 55 and 120 million weights of one operator."""
    linears = [(i, layer) for i, layer in enumerate(classifier) if isinstance(layer, nn.Linear)]
    for place, (index, layer) in enumerate(linears):
        inputs = width if place else layer.in_features
        outputs = layer.out_features if place == len(linears) - 1 else width
        classifier[index] = nn.Linear(inputs, outputs)


def _text_or_patch_net(name: str) -> ZooNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "vit": _vit}[name]()


VOCABULARY, SEQUENCE = 320, 12


def _tokens(batch: int, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=generator),)


def _padded_tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and the mask of a batch whose samples have different lengths."""
    (tokens,) = _tokens(batch, generator)
    lengths = torch.randint(SEQUENCE // 2, SEQUENCE + 1, (batch, 1), generator=generator)
    return tokens, (torch.arange(SEQUENCE) < lengths).long()


def _bert() -> ZooNet:
    """Returns its library's own output dataclass."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    dynamic = {"input_ids": {0: "batch"}, "attention_mask": {0: "batch"}}
    return ZooNet("bert", BertModel(config).eval(), _padded_tokens, dynamic)


def _gpt2() -> ZooNet:
    """Its head and its token embedding are one weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=64,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ZooNet("gpt2", GPT2LMHeadModel(config).eval(), _tokens, {"input_ids": {0: "batch"}})


def _llama() -> ZooNet:
    """Grouped-query attention: 4 query heads, 2 of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return ZooNet("llama", LlamaForCausalLM(config).eval(), _tokens, {"input_ids": {0: "batch"}})


def _vit() -> ZooNet:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )

    def images(batch: int, generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 32, 32, generator=generator),)

    return ZooNet("vit", ViTForImageClassification(config).eval(), images, {"pixel_values": {0: "batch"}})
