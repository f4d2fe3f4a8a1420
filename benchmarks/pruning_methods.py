"""Ways to make a trained net smaller: ours, and those of Torch-Pruning and only-train-once.

All get the same calibration images, and go to the same part of the multiply-accumulates, which are counted by one
counter for all, or of the latency, for which all are compiled by us and take turns with the net that was trained.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphopt as go
from graphopt.deployed import Deployed
from graphopt.measure import Stopwatch
from graphopt.target import Target
from graphopt.train import finetune

__all__ = ["METHODS", "Budget", "Task", "Unsupported", "macs", "only_train_once", "ours"]

Budget = Literal["macs", "latency"]
VECTOR = 16
"""Channels that stay are multiples of it where a latency is asked for."""


class Unsupported(Exception):
    """A method that cannot do a net; the message is its own."""


@dataclass(frozen=True)
class Task:
    """A net to be made smaller.

    Attributes:
        module: the trained net, which stays as it is.
        part: the part of its multiply-accumulates, or of its latency, to keep.
        calibration: images and their classes, in batches.
    """

    module: nn.Module
    part: float
    calibration: list[tuple[Tensor, Tensor]] = field(repr=False)
    seed: int
    budget: Budget = "macs"

    @property
    def example(self) -> Tensor:
        return self.calibration[0][0][:1]

    def left(self, small: nn.Module | go.Model) -> float:
        """The part of what is budgeted that a smaller net still takes."""
        if self.budget == "latency":
            return self.latency(small)
        return macs(small, self.example) / macs(self.module, self.example)

    def latency(self, small: nn.Module | go.Model) -> float:
        """The part of the latency, of both compiled for one thread and run on one image."""
        return self._deployed.part(self._captured(small))

    @cached_property
    def _deployed(self) -> Deployed:
        return Deployed(self._captured(self.module), Stopwatch(Target.parse("cpu"), threads=1))

    def _captured(self, net: nn.Module | go.Model) -> go.Model:
        module = net.module if isinstance(net, go.Model) else net
        with torch.no_grad():
            return go.capture(deepcopy(module).cpu().eval(), (self.example.cpu(),), dynamic={0: {0: "batch"}})


def macs(model: nn.Module | go.Model, example: Tensor) -> float:
    """Multiply-accumulates for one image."""
    module = model.module if isinstance(model, go.Model) else model
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(example.to(next(module.parameters()).device))  # attention in its parts, which the counter knows
    return counter.get_total_flops() / 2


def ours(task: Task, options: str = "") -> go.Model:
    """`prune-channels`, with its defaults."""
    model = go.capture(deepcopy(task.module).eval(), (task.example,), dynamic={0: {0: "batch"}})
    images = [(x,) for x, _ in task.calibration]
    threads = ",threads=1" if task.budget == "latency" else ""
    text = f"prune-channels{{{task.budget}={task.part},seed={task.seed}{threads}{options}}}"
    return go.run(model, text, calib=images, check=False)[0]


CRITERIA = ("magnitude", "taylor", "bn-scale", "lamp", "fpgm", "random")
"""Of Torch-Pruning. Each is tried with the same part of every group, and ranked over all groups ("global")."""


def criterion(task: Task, name: str, *, everywhere: bool) -> nn.Module:
    """Torch-Pruning, once, with the ratio that leaves the wanted part: bisected, for a latency in fewer steps."""
    gradients: list[Tensor | None] = []
    if name == "taylor":
        trained = deepcopy(task.module).eval()
        for images, classes in task.calibration:
            functional.cross_entropy(trained(images), classes).backward()
        gradients = [parameter.grad for parameter in trained.parameters()]
    low, high = 0.0, 0.98
    best = None
    for _ in range(9 if task.budget == "macs" else 6):
        middle = (low + high) / 2
        small = _torch_pruned(task, name, middle, everywhere, gradients)
        if task.left(small) > task.part:
            low = middle
        else:
            high, best = middle, small
    if best is None:
        raise Unsupported("no ratio leaves so little")
    return best


def _torch_pruned(task: Task, name: str, ratio: float, everywhere: bool, gradients: list[Tensor | None]) -> nn.Module:
    import torch_pruning as tp

    torch.manual_seed(task.seed)
    module = deepcopy(task.module).eval()
    for parameter, gradient in zip(module.parameters(), gradients, strict=False):
        parameter.grad = None if gradient is None else gradient.clone()
    kinds = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "bn-scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
        "random": tp.importance.RandomImportance,
    }
    position = getattr(module, "position", None)
    pruner = tp.pruner.BasePruner(
        module,
        task.example,
        importance=kinds[name](),
        global_pruning=everywhere,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        round_to=VECTOR if task.budget == "latency" else None,
        ignored_layers=[m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 10],
        num_heads={m.qkv: m.heads for m in module.modules() if hasattr(m, "qkv")},
        unwrapped_parameters=[(position, 2)] if position is not None else None,
    )
    pruner.step()
    module.zero_grad()
    return module


def only_train_once(task: Task, sparsity: float, optimizer: dict[str, Any], tune: dict[str, Any]) -> nn.Module:
    """HESSO: units fade out during the fine-tuning, in five periods over its first half, and are cut out afterwards.

    The package was written for older versions of torch and for a GPU; names it expects are put in place first.
    """
    _prepare_only_train_once()
    from only_train_once import OTO

    torch.manual_seed(task.seed)
    module = deepcopy(task.module)
    steps = len(tune["data"])
    try:
        oto = OTO(module, task.example)
        hesso = oto.hesso(
            target_group_sparsity=sparsity,
            start_pruning_step=steps // 10,
            pruning_periods=5,
            pruning_steps=steps // 2,
            **optimizer,
        )
    except Exception as error:  # whatever it meets in a net that it does not know
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    finetune(module, optimizer=hesso, **tune)
    module.eval()
    with tempfile.TemporaryDirectory() as folder:
        oto.construct_subnet(out_dir=folder)
        small: nn.Module = torch.load(oto.compressed_model_path, weights_only=False)  # written by the line before
    return small.eval()


def _prepare_only_train_once() -> None:
    from torch.onnx._internal.torchscript_exporter import _globals, utils

    sys.modules["torch.onnx._globals"] = _globals
    torch.onnx._optimize_graph = utils._optimize_graph  # type: ignore[attr-defined]  # that is where it was
    if not torch.cuda.is_available():
        torch.Tensor.cuda = _stay  # type: ignore[method-assign]  # HESSO moves its masks to a GPU


def _stay(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


METHODS: dict[str, Callable[[Task], nn.Module | go.Model]] = {"graphopt": ours}
for _name in CRITERIA:
    METHODS[f"torch-pruning {_name}"] = partial(criterion, name=_name, everywhere=False)
    METHODS[f"torch-pruning {_name} global"] = partial(criterion, name=_name, everywhere=True)
