"""Steps of an optimizer over data, that can be stopped at any moment and go on as if they had not been."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError, LoadError
from graphopt.train.checkpoint import load_checkpoint, save_checkpoint
from graphopt.train.sparse import SparseOptimizer
from graphopt.train.student import Student, distributed

__all__ = ["Diverged", "Run", "Training"]


class Diverged(GraphoptError):
    """A loss that is no number any more."""


@dataclass
class Training:
    """What a training has done: the mean loss and the seconds of every epoch, and the steps in all."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0


class Run:
    """One training, from its first step or from a checkpoint to its last."""

    def __init__(
        self, student: Student, optimizer: torch.optim.Optimizer, steps: int, warmup: float, ema: float | None
    ) -> None:
        self.student, self.optimizer, self.steps = student, optimizer, steps
        maps = list(student.inner.parameters())
        if maps:
            optimizer.add_param_group({"params": maps, "weight_decay": 0.0})
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, int(warmup * steps)))
        self.mean = _Mean(student.module, ema) if ema is not None else None
        self.done = Training()
        self._epoch_rng = torch.get_rng_state()
        self._sum = 0.0

    def through(
        self,
        data: Any,
        epochs: int,
        *,
        before_step: Callable[[], None] | None,
        file: Path | None,
        every: int,
        progress: bool,
    ) -> Training:
        """Train through all epochs that are not done."""
        seen = self._resume(file, len(data)) if file is not None and file.exists() else 0
        with _bar(self.steps, self.done.steps, shown=progress) as advance:
            for epoch in range(len(self.done.losses), epochs):
                start = time.perf_counter()
                for batch in self._batches(data, epoch, seen):
                    self._step(batch, before_step)
                    advance(self._sum / (self.done.steps - epoch * len(data)))
                    if file is not None and self.done.steps % every == 0 and self.done.steps < self.steps:
                        self._save(file)
                self.done.losses.append(self._sum / len(data))
                self.done.seconds.append(time.perf_counter() - start)
                self._sum, seen = 0.0, 0
        if self.mean is not None:
            self.mean.into(self.student.module)
            if isinstance(self.optimizer, SparseOptimizer):
                self.optimizer.hold()  # the mean of what became zero is not zero
        if file is not None:
            self._save(file)
        return self.done

    def _batches(self, data: Any, epoch: int, seen: int) -> Iterator[Any]:
        """The batches of an epoch after the first `seen`, which are drawn again so that random numbers agree."""
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        after = torch.get_rng_state()
        if seen:
            torch.set_rng_state(self._epoch_rng)
        else:
            self._epoch_rng = after
        for index, batch in enumerate(data):
            if index >= seen:
                yield batch
            elif index == seen - 1:
                torch.set_rng_state(after)

    def _step(self, batch: Any, before_step: Callable[[], None] | None) -> None:
        loss = self.student.loss_of(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {self.done.steps}", todo="train with a smaller lr, or a longer warmup"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if before_step is not None:
            before_step()
        self.optimizer.step()
        self.schedule.step()
        if self.mean is not None:
            self.mean.add(self.student.module)
        self._sum += value
        self.done.steps += 1

    def _save(self, file: Path) -> None:
        if distributed() and torch.distributed.get_rank() != 0:
            return
        state = {
            "steps": self.steps,
            "done": asdict(self.done),
            "sum": self._sum,
            "model": dict(_state(self.student.module)),
            "inner": dict(self.student.inner.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "mean": {"count": self.mean.count, "state": self.mean.state} if self.mean is not None else None,
            "epoch_rng": self._epoch_rng,
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(file, state)

    def _resume(self, file: Path, length: int) -> int:
        """Take over a checkpoint; returns how many batches of its epoch were seen."""
        state = load_checkpoint(file)
        mine = dict(_state(self.student.module))
        saved = state.get("model", {}) if isinstance(state, dict) else {}
        if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in mine.items()}:
            raise LoadError("the checkpoint is of another model", where=str(file), todo="delete it to start anew")
        if state["steps"] != self.steps:
            raise LoadError(
                f"the checkpoint is of a training of {state['steps']} steps, this one has {self.steps}",
                where=str(file),
                todo="delete it to start anew",
            )
        if not self._fits(state):
            raise LoadError(
                "the checkpoint is of another optimizer, or was written by another version",
                where=str(file),
                todo="delete it to start anew",
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        self.student.inner.load_state_dict(state["inner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.mean is not None and state["mean"] is not None:
            self.mean.count = state["mean"]["count"]
            self.mean.state = {name: x.to(mine[name].device) for name, x in state["mean"]["state"].items()}
        self.done, self._sum = Training(**state["done"]), state["sum"]
        self._epoch_rng = state["epoch_rng"]
        torch.set_rng_state(state["rng"])
        return self.done.steps - len(self.done.losses) * length

    def _fits(self, state: dict[str, Any]) -> bool:
        """Whether a checkpoint holds all that this training goes on from, for as many groups of parameters."""
        parts = {"inner", "optimizer", "schedule", "mean", "done", "sum", "epoch_rng", "rng"}
        if not parts <= state.keys():
            return False
        groups = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        mine = [len(group["params"]) for group in self.optimizer.param_groups]
        return groups == mine and state["schedule"].keys() == self.schedule.state_dict().keys()


class _Mean:
    """The exponential moving mean of all weights and statistics (Polyak averaging)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.state = {name: x.detach().clone() for name, x in _state(module)}

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 9))  # the first weights are not worth keeping
        for name, x in _state(module):
            if x.is_floating_point():
                self.state[name].lerp_(x.detach(), 1 - decay)
            else:
                self.state[name].copy_(x)

    @torch.no_grad()
    def into(self, module: nn.Module) -> None:
        for name, x in _state(module):
            x.copy_(self.state[name])


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _cosine(steps: int, warmup: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


@contextmanager
def _bar(steps: int, done: int, *, shown: bool) -> Iterator[Callable[[float], None]]:
    """A function that takes the loss after every step."""
    if not shown or not sys.stderr.isatty() or (distributed() and torch.distributed.get_rank() != 0):
        yield lambda loss: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=steps, completed=done)
        yield lambda loss: bar.update(task, advance=1, description=f"training, loss {loss:.4f}")
