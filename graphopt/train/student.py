"""A model that is being trained, and the loss it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.train.distill import Distill, InnerLoss, logit_loss, tapped

__all__ = ["Student", "distributed"]


def distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Student:
    """Computes the loss of a batch.

    Attributes:
        module: what is trained; gradients reach its parameters.
        inner: the maps of inner distillation, which are trained along.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        teacher: Model | nn.Module | None,
        distill: Distill,
        loss: Callable[[Tensor, Tensor], Tensor],
        autocast: torch.dtype | None,
    ) -> None:
        self.distill, self.loss, self.autocast = distill, loss, autocast
        self.module = model.module if isinstance(model, Model) else model
        self._forward = _forward(model, distill.inner)
        if isinstance(teacher, Model):
            teacher = teacher.clone(share_tensors=True).eval()
        self._teacher = None if teacher is None else _forward(teacher, distill.inner)
        self.inner = InnerLoss()
        self.device = next(self.module.parameters()).device
        if distributed():
            self._forward = DistributedDataParallel(self._forward)

    def prepare(self, batch: Any) -> None:
        """Make the maps of inner distillation, from the values of a first batch."""
        assert self._teacher is not None
        inputs, _ = self._split(batch)
        statistics = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        with torch.no_grad():
            mine, theirs = self._forward(*inputs)[1:], self._teacher(*inputs)[1:]
            for name, buffer in self.module.named_buffers():
                buffer.copy_(statistics[name])  # batch norms have counted this batch
        self.inner.prepare([_wide(x) for x in mine], [_wide(x) for x in theirs], self.distill.inner)
        if distributed():
            for parameter in self.inner.parameters():
                torch.distributed.broadcast(parameter.data, 0)
            for scale in self.inner.buffers():
                torch.distributed.all_reduce(scale)  # every process has looked at a part of the batch
                scale /= torch.distributed.get_world_size()
            self.inner = _wrapped(self.inner)

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of one batch.

        Raises:
            UsageError: for a batch that is no pair, or without targets and without a teacher.
        """
        inputs, targets = self._split(batch)
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            outputs = _listed(self._forward(*inputs))
            taught = None
            if self._teacher is not None:
                with torch.no_grad():
                    taught = _listed(self._teacher(*inputs))
        part = self.distill.logits if taught is not None and targets is not None else float(taught is not None)
        total = outputs[0].new_zeros((), dtype=_wide(outputs[0]).dtype)
        if targets is not None:
            total = total + (1 - part) * self.loss(_wide(outputs[0]), targets)
        elif taught is None:
            raise UsageError("a batch has no targets, and there is no teacher to give them")
        if taught is not None and part:
            total = total + part * logit_loss(_wide(outputs[0]), _wide(taught[0]), self.distill.temperature)
        if taught is not None and self.distill.inner:
            inner = self.inner([_wide(x) for x in outputs[1:]], [_wide(x) for x in taught[1:]])
            total = total + self.distill.inner_weight * inner
        return total

    def _split(self, batch: Any) -> tuple[tuple[Any, ...], Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UsageError("a batch has to be a pair of inputs and targets", todo="yield (inputs, targets)")
        inputs, targets = pytree.tree_map_only(torch.Tensor, lambda x: x.to(self.device, non_blocking=True), batch)
        return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), targets


def _forward(model: Model | nn.Module, inner: tuple[str, ...]) -> nn.Module:
    if isinstance(model, Model):
        return tapped(model, inner) if inner else model.module
    if inner:
        raise UsageError("values inside can be compared in captured models only", todo="capture the module first")
    return model


def _wrapped(inner: InnerLoss) -> Any:
    return DistributedDataParallel(inner) if list(inner.parameters()) else inner


def _wide(value: Tensor) -> Tensor:
    """In float32 at least: losses are not computed in what autocast takes."""
    return value if value.dtype == torch.float64 else value.float()


def _listed(outputs: Any) -> list[Tensor]:
    """The tensors among the outputs, the first of which are the logits."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
