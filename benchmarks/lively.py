"""Random weights that behave like trained ones: no constant parameters, batch norms with statistics of real data."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["calibrate", "enliven"]

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def enliven(module: nn.Module) -> None:
    """Give constant parameters (zero biases, unit scales, layer scales of 1e-6) values that matter.

    A net without normalisation gets weights that keep its signal's size (He initialisation,
    arXiv:1502.01852); with torch's own, its output is little but the last bias.
    """
    if not any(isinstance(layer, NORMALISATIONS) for layer in module.modules()):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    for parameter in module.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            if parameter.flatten()[0] == 0:
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)


def calibrate(module: nn.Module, batches: list[tuple[Any, ...]]) -> None:
    """Set running statistics to the mean over `batches`, with everything else (dropout) as in eval mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for args in batches if norms else []:
        module(*args)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
