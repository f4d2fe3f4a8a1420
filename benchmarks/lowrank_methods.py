"""Low-rank substitution by ours and, from their formulas, by others: the same layers, the same size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

import graphopt as go

__all__ = ["METHODS", "parameters"]

Batches = Sequence[tuple[Tensor, ...]]


def parameters(net: nn.Module | go.Model) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _ours(options: str) -> Callable[[nn.Module, float, Batches, int], nn.Module]:
    def made(net: nn.Module, part: float, calib: Batches, seed: int) -> nn.Module:
        model = go.capture(deepcopy(net).eval(), (calib[0][0][:1],), dynamic={0: {0: "batch"}})
        text = f"low-rank{{params={part},seed={seed}{options}}}"
        return go.run(model, text, calib=calib, check=False)[0].module

    return made


def _limited(limit: Callable[[int, int, int], int]) -> Callable[[nn.Module, float, Batches, int], nn.Module]:
    """Plain SVD with one fraction of a limit everywhere, the largest fraction that meets the budget."""

    def made(net: nn.Module, part: float, calib: Batches, seed: int) -> nn.Module:
        def at(fraction: float) -> nn.Module:
            copy = deepcopy(net)
            for owner, name, layer in list(_layers(copy)):
                out, inputs = layer.weight.shape[:2]
                most = limit(out, inputs, layer.weight[0, 0].numel())
                rank = int(fraction * most)
                if 1 <= rank < most:
                    setattr(owner, name, _factorised(layer, rank))
            return copy

        low, high = 0.0, 1.0 - 1e-9
        for _ in range(20):
            middle = (low + high) / 2
            fits = parameters(at(middle)) <= part * parameters(net)
            low, high = (middle, high) if fits else (low, middle)
        return at(low)

    return made


def _layers(net: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d | nn.Linear]]:
    for owner in net.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1):
                yield owner, name, child


def _factorised(layer: nn.Conv2d | nn.Linear, rank: int) -> nn.Sequential:
    """The window, or the inputs, to `rank` channels; then to the outputs. Both get the root of the singular values."""
    weight = layer.weight.detach()
    u, s, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    root = s[:rank].sqrt()
    a, b = (u[:, :rank] * root).to(weight), (root[:, None] * v[:rank]).to(weight)
    if isinstance(layer, nn.Linear):
        pair: list[nn.Module] = [
            nn.Linear(layer.in_features, rank, bias=False),
            nn.Linear(rank, layer.out_features, bias=layer.bias is not None),
        ]
    else:
        first = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False
        )
        pair = [first, nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)]
    with torch.no_grad():
        pair[0].weight.copy_(b.reshape(pair[0].weight.shape))  # type: ignore[operator, arg-type, union-attr]
        pair[1].weight.copy_(a.reshape(pair[1].weight.shape))  # type: ignore[operator, arg-type, union-attr]
        if layer.bias is not None:
            pair[1].bias.copy_(layer.bias)  # type: ignore[operator, union-attr]
    return nn.Sequential(*pair).to(weight.device)


def _greenformer(out: int, inputs: int, taps: int) -> int:
    """The limit of Greenformer 0.2.2, which does not look at the window."""
    return out * inputs // (out + inputs)


def _break_even(out: int, inputs: int, taps: int) -> int:
    return math.ceil(out * inputs * taps / (out + inputs * taps))


METHODS: dict[str, Callable[[nn.Module, float, Batches, int], nn.Module]] = {
    "low-rank": _ours(""),
    "low-rank, two factors": _ours(",forms=linear;kxk-1x1;1xk-kx1;kx1-1xk;1x1-kxk"),
    "low-rank, activation": _ours(",solver=activation"),
    "ALDS": _ours(",allocation=alds"),
    "uniform SVD": _limited(_break_even),
    "Greenformer": _limited(_greenformer),
}
"""Each takes a trained net, the part of its parameters to keep, calibration data and a seed."""
