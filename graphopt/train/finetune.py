"""The short training that wins back what pruning has lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.train.distill import Distill
from graphopt.train.run import Diverged, Run, Training
from graphopt.train.student import Student

__all__ = ["Batches", "Diverged", "Training", "finetune"]


class Batches(Protocol):
    """Pairs of inputs (a tensor, or several in a tuple) and targets, as many every time: a DataLoader, a list. With a
    method `set_epoch(epoch)` it is told which time that is."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def finetune(
    model: Model | nn.Module,
    data: Batches,
    *,
    epochs: int = 1,
    lr: float = 0.01,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    teacher: Model | nn.Module | None = None,
    distill: Distill | None = None,
    warmup: float = 0.05,
    ema: float | None = None,
    before_step: Callable[[], None] | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 200,
    progress: bool = True,
) -> Training:
    """Train a model in place, on the device its parameters are on.

    Args:
        model: in training mode while it trains, afterwards in the mode it was in. Under `torchrun` every process calls
            this with its part of the data; gradients are averaged.
        data: targets may be None where a teacher gives all logits.
        epochs: how many times through the data.
        lr: of the optimizer that is made where none is given: SGD with Nesterov momentum 0.9 and a decay of 5e-4 on
            everything that has more than one axis.
        optimizer: over the model's parameters. Its learning rates rise over the part `warmup` of all steps and fall to
            zero along a cosine (Loshchilov and Hutter, SGDR, 2017).
        loss: of the first output and the targets.
        teacher: usually the model before it was pruned; it is left as it is, see `distill` for what is learned from it.
        distill: how much is learned from the teacher, and where.
        warmup: part of all steps.
        ema: the result is the running mean of all weights with this decay, 0.999 say, instead of the last ones.
        before_step: called when the gradients are there, for a regulariser that adds to them.
        autocast: torch.bfloat16 to compute in it where that is enough.
        checkpoint: a file that is written every `every` steps and at the end; where there is one already, training
            goes on from it and ends as if it had never stopped, torch's random numbers included.
        every: steps.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        UsageError: for options that do not fit together.
        LoadError: when the checkpoint is damaged, or of another training.
        Diverged: when the loss is no number.
    """
    _check(epochs, every, warmup, ema, teacher, distill)
    if not len(data):
        raise UsageError("there is no data to train on")
    with _modes(model, teacher):
        student = Student(model, teacher, distill or Distill(), loss, autocast)
        if distill is not None and distill.inner:
            with torch.random.fork_rng():  # a look at the data that must not change what comes
                student.prepare(next(iter(data)))
        run = Run(student, optimizer or _sgd(student.module, lr), len(data) * epochs, warmup, ema)
        file = Path(checkpoint) if checkpoint is not None else None
        return run.through(data, epochs, before_step=before_step, file=file, every=every, progress=progress)


def _check(
    epochs: int, every: int, warmup: float, ema: float | None, teacher: object | None, distill: Distill | None
) -> None:
    if epochs < 1 or every < 1:
        raise UsageError(f"epochs is {epochs} and every is {every}, both have to be at least 1")
    if not 0 <= warmup < 1:
        raise UsageError(f"warmup is {warmup:g}, it has to be from 0 to below 1, a part of all steps")
    if ema is not None and not 0 < ema < 1:
        raise UsageError(f"ema is {ema:g}, it has to be between 0 and 1; 0.999 is usual")
    if distill is not None and teacher is None:
        raise UsageError("there is nobody to distil from", todo="give a teacher, usually the model before pruning")


@contextmanager
def _modes(model: Model | nn.Module, teacher: Model | nn.Module | None) -> Iterator[None]:
    """Training mode for the model and evaluation for a teacher that is a module; each as it was afterwards."""
    before = _is_training(model)
    frozen = {m: m.training for m in teacher.modules()} if isinstance(teacher, nn.Module) else {}
    model.train()
    if isinstance(teacher, nn.Module):
        teacher.eval()
    try:
        yield
    finally:
        if not before:
            model.eval()
        for module, training in frozen.items():
            module.training = training


def _is_training(model: Model | nn.Module) -> bool:
    return model.mode == "train" if isinstance(model, Model) else model.training


def _sgd(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 5e-4},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, nesterov=True)
