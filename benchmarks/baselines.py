"""Small nets trained here on small images, once, for all benchmarks that need a trained net.

    python -m benchmarks.baselines                     train what is not in the cache; goes on after a kill
    python -m benchmarks.baselines cifar10 resnet      one of them

The weights are kept in the user's cache, under a key of everything they depend on.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphopt as go
from benchmarks import small_nets
from benchmarks.images import DATA, Images, Shuffled, images
from benchmarks.small_nets import NETS, small_net
from graphopt.files import write_whole
from graphopt.train import finetune

__all__ = ["DEVICE", "accuracy", "baseline", "fast_dtype"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

EPOCHS = {"cifar10": 8, "fashion": 3}
BATCH = 128


def baseline(data: str, net: str) -> tuple[nn.Module, dict[str, Any]]:
    """The trained net in evaluation mode, on `DEVICE`, and what is known of its training (test accuracy, seconds)."""
    source = inspect.getsource(small_nets) + json.dumps([EPOCHS[data], BATCH])
    key = hashlib.sha256(source.encode()).hexdigest()[:12]
    file = platformdirs.user_cache_path("graphopt") / "baselines" / f"{data}-{net}-{key}.safetensors"
    loaded = images(data)
    torch.manual_seed(0)
    module = small_net(net, loaded.train.shape[1], loaded.train.shape[2]).to(DEVICE)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        seconds = _train(module, loaded, EPOCHS[data], net, file.with_suffix(".checkpoint"))
        known = {"accuracy": accuracy(module.eval(), loaded), "seconds": seconds}
        with write_whole(file) as scratch:
            save_file(dict(module.state_dict()), scratch, metadata={"known": json.dumps(known)})
    module.load_state_dict(load_file(file))
    return module.eval(), _known(file)


def _known(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        known: dict[str, Any] = json.loads(opened.metadata()["known"])
    return known


def _train(module: nn.Module, data: Images, epochs: int, net: str, checkpoint: Path) -> float:
    start = time.perf_counter()
    batches = Shuffled(data, BATCH, 0, shift=4 if data.train.shape[1] == 3 else 2)
    optimizer = optimizer_for(module, net, 1.0)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave the keyword out
    finetune(module, batches, epochs=epochs, optimizer=optimizer, autocast=fast_dtype(net), checkpoint=checkpoint)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # the same
    checkpoint.unlink()
    return round(time.perf_counter() - start, 1)


def optimizer_for(module: nn.Module | go.Model, net: str, scale: float) -> torch.optim.Optimizer:
    """SGD for convolutions and AdamW for a transformer, at `scale` times the rate of a training from scratch."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if net == "vit":
        return torch.optim.AdamW(groups, lr=1e-3 * scale, weight_decay=0.05)
    return torch.optim.SGD(groups, lr=0.1 * scale, momentum=0.9, nesterov=True, weight_decay=5e-4)


def fast_dtype(net: str) -> torch.dtype | None:
    """bfloat16 for wide convolutions where the device multiplies it; it slows the narrow layers down."""
    flags = Path("/proc/cpuinfo")
    multiplies = DEVICE.type == "cuda" or (flags.exists() and "avx512_bf16" in flags.read_text())
    return torch.bfloat16 if multiplies and net in ("resnet", "vgg") else None


@torch.no_grad()
def accuracy(module: Any, data: Images) -> float:
    """Part of the test images that get their class, in float32."""
    right = 0
    for x, y in zip(data.test.split(500), data.test_classes.split(500), strict=True):
        right += int((_logits(module(x.to(DEVICE))).argmax(1).cpu() == y).sum())
    return right / len(data.test)


def _logits(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=list(DATA))
    parser.add_argument("net", nargs="?", choices=NETS)
    options = parser.parse_args()
    for data in [options.data] if options.data else DATA:
        for net in [options.net] if options.net else NETS:
            print(data, net, baseline(data, net)[1], flush=True)


if __name__ == "__main__":
    main()
