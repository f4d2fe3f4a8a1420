"""Running a pipeline on a module, for tests of passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import graphopt as go
from graphopt import Model
from graphopt.printer import operator_name
from graphopt.transform import Report
from tests.compare import relative_error

__all__ = ["Net", "a_second", "apply", "errors_at", "gradients", "operators", "reasons"]


class Net(nn.Module):
    """A net in eval mode whose forward is the given function of itself and the input.

    Members are submodules, parameters, or tensors, which become buffers that are not in the state dict.
    """

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member, persistent=False)
            else:
                setattr(self, name, member)
        self.eval()

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def apply(
    module: nn.Module,
    inputs: Sequence[Any],
    pipeline: str,
    *,
    dynamic: Mapping[str | int, Any] | None = None,
) -> tuple[Model, Model, Report]:
    """The captured model, the model after `pipeline`, and the report of its last pass. Module and mode stay."""
    before = go.capture(module, tuple(inputs), dynamic=dynamic)
    after, reports = go.run(before, pipeline)
    return before, after, reports[-1]


def operators(model: Model) -> list[str]:
    """Names of the calls in order."""
    return [operator_name(node.target) for node in model.graph.nodes if node.op == "call_function"]


def reasons(report: Report) -> list[str]:
    """Why candidates were left alone."""
    return [miss.reason for miss in report.misses]


def errors_at(module: nn.Module, model: Model, *batches: Sequence[Any]) -> float:
    """The largest error of `model` against eager execution of `module`, over several calls."""
    with torch.no_grad():
        return max(relative_error(model(*inputs), module(*inputs)) for inputs in batches)


def gradients(model: Model, inputs: Sequence[Any]) -> dict[str, torch.Tensor | None]:
    """Gradient of the sum of squares of all outputs by every parameter of a model."""
    for parameter in model.parameters():
        parameter.grad = None
    outputs = model(*inputs)
    loss = sum((out.double() ** 2).sum() for out in torch.utils._pytree.tree_leaves(outputs) if out.is_floating_point())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def a_second(table: object, node: torch.fx.Node) -> float:
    """For `LatencyTable.seconds`: a second for every layer, half of one at half its width (its tensors are on meta)."""
    return 0.5 if any(used.meta["val"].device.type == "meta" for used in node.all_input_nodes) else 1.0
