"""Runs of a user's module and of the graph that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphopt.check import relative_error, tolerance
from graphopt.model import Model
from graphopt.signature import TensorSpec
from graphopt.transform import Contract

__all__ = ["Calls", "agree", "near", "record", "run_module"]

_SLACK = 10
"""How many times the tolerance of an exact rewrite a part may be off: what came before it has rounded too."""


class Calls(TorchFunctionMode):
    """Counts the calls of torch that have come to an end: how far a run has come."""

    done, counts = 0, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.done += self.counts
        return made

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        self.counts = False
        try:
            yield
        finally:
            self.counts = True


def run_module(model: Model, module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The flat outputs of a user's module on the flat inputs of the model."""
    given = [tensor.clone() for tensor in inputs]  # a user's code may write to its inputs
    args, kwargs = pytree.tree_unflatten(_leaves(model, given), model.in_spec)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _leaves(model: Model, inputs: Sequence[Tensor]) -> list[Any]:
    flat = iter(inputs)
    return [next(flat) if isinstance(spec, TensorSpec) else spec.value for spec in model.signature.inputs]


def record(model: Model, inputs: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """Every tensor that the graph computes."""
    found: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            if n.op == "call_function" and isinstance(made, Tensor):
                found[n] = made
            return made

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        Recorder(model.module).run(*_leaves(model, inputs), enable_io_processing=False)
    return found


def agree(output: Any, expected: list[Tensor]) -> bool:
    """Whether a part returns a value of the graph; what else it returns may be read by nobody."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return not leaves or any(near(leaf, value) for leaf in leaves for value in expected)


def near(value: Tensor, reference: Tensor) -> bool:
    """Whether a value is the other within rounding."""
    return relative_error(value, reference) <= _SLACK * tolerance(Contract.EXACT, reference.dtype)
