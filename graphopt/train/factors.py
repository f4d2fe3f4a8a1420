"""Layers written as two factors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphopt.errors import UsageError
from graphopt.names import nearest

__all__ = ["Factored", "Window", "as_factors", "selected"]

Window = Literal["first", "second"]
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Factored(nn.Sequential):
    """A layer W = U V^T as two ordinary ones in a row: the first holds V^T and adds nothing, the second U and the bias.

    It is captured as these two. `weight` and `bias` are for modules that look into the layer that was here.
    """

    @property
    def weight(self) -> Tensor:
        """The product, in the layout of the layer that was here: [out, in, *window]."""
        inner, outer = self[0].weight, self[1].weight
        return torch.einsum("or...,ri...->oi...", outer, inner)  # of two convolutions at most one has a window

    @property
    def bias(self) -> Tensor | None:
        """[out], or None."""
        found = self[1].bias
        return found if isinstance(found, Tensor) else None


def as_factors(
    net: nn.Module,
    rank: int | float = 1.0,
    *,
    window: Window = "first",
    only: Sequence[str] = (),
    leave: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a net with linear layers and convolutions in two factors, from the singular values of their weights:
    W = (P s^1/2) (s^1/2 Q^T). At full rank it computes what the net does.

    Args:
        net: is left as it is.
        rank: a number, or a part of each layer's full rank (1.0 for all of it). Full is the smaller side of the matrix
            [out, in * window], or [out * window, in].
        window: whether the first factor of a convolution has its window and the second is 1x1, or the other way round.
        only, leave: names of layers, or of modules that they are in, to take and to leave alone.

    Returns:
        The copy, and for each layer that could not be taken the reason. These are: weights that are shared, frozen,
        computed, without data or too small, groups, hooks, and layers of other classes, transposed convolutions too.

    Raises:
        UsageError: for a rank of 0 or above the full one, a name that is no layer's, a layer named in `only` that
            cannot be taken, a weight that is not finite, and when there is no layer to take.
    """
    if window not in ("first", "second"):
        raise UsageError(
            f"window is '{window}'", todo="say 'first' for k x k then 1 x 1, 'second' for 1 x 1 then k x k"
        )
    if not rank > 0:
        raise UsageError(f"rank is {rank:g}, it has to be a whole number from 1 on, or a part above 0 up to 1.0")
    layers, left = _layers(net, only, leave)
    made = copy.deepcopy(net)
    for name, layer in layers.items():
        assert isinstance(layer, _LAYERS)
        factored = _factored(name, layer, rank, window)
        if not name:
            return factored, left
        made.set_submodule(name, factored)
    return made, left


def selected(known: Mapping[str, object], only: Sequence[str], leave: Sequence[str]) -> list[str]:
    """The names that `only` and `leave` let through, which are names, or paths that names are below.

    Raises:
        UsageError: for a path of none.
    """

    def within(name: str, paths: Sequence[str]) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in paths)

    for path in (*only, *leave):
        if not any(within(name, [path]) for name in known):
            raise UsageError(f"there is no layer '{path}'", todo=nearest(path, known))
    return [name for name in known if (not only or within(name, only)) and not within(name, leave)]


def _layers(net: nn.Module, only: Sequence[str], leave: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that are to become factors, and why others cannot."""
    paths = list(net.named_modules(remove_duplicate=False))
    looked_at = {name: module for name, module in paths if _has_matrix(module)}
    taken = selected(looked_at, only, leave)
    uses = Counter(id(module) for _, module in paths)
    owners = Counter(id(p) for module in net.modules() for p in module.parameters(recurse=False))
    left = {name: why for name in taken if (why := _why_not(looked_at[name], uses, owners)) is not None}
    for name in only:
        if name in left:
            raise UsageError(f"'{name}' cannot be written as factors", why=left[name])
    layers = {name: looked_at[name] for name in taken if name not in left}
    if not layers:
        why = "; ".join(f"'{name}': {reason}" for name, reason in left.items())
        raise UsageError("no layer could be written as factors", why=why or "there is none")
    return layers, left


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _why_not(module: nn.Module, uses: Mapping[int, int], owners: Mapping[int, int]) -> str | None:
    """Why a module that has a weight cannot be written as factors."""
    if type(module) not in _LAYERS or "weight" not in module._parameters:
        return f"it is a {type(module).__name__}" if type(module) not in _LAYERS else "its weight is computed"
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if uses[id(module)] > 1 or owners[id(weight)] > 1:
        return "its weight is shared: all layers that read it would have to change"
    if getattr(module, "groups", 1) != 1:
        return f"it has {module.groups} groups, and each would have a rank of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "there are hooks on it"
    if not weight.requires_grad:
        return "its weight is frozen"
    if weight.is_meta:
        return "its weight has no data"
    if min(weight.shape[0], weight[0].numel()) < 2:
        return "its full rank is 1"
    return None


def _factored(name: str, layer: Layer, rank: int | float, window: Window) -> Factored:
    weight = layer.weight.detach()
    if not torch.isfinite(weight).all():
        raise UsageError(f"the weight of '{name}' is not finite")
    rows = weight if window == "first" else weight.movedim(1, -1)
    matrix = rows.flatten(1) if window == "first" else rows.flatten(0, -2)
    r = _number(name, rank, min(matrix.shape))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = values[:r].sqrt()
    inner, outer = _two(layer, r, window)
    with torch.no_grad():
        inner.weight.copy_((root[:, None] * right[:r]).reshape(inner.weight.shape))
        side = (left[:, :r] * root).reshape(weight.shape[0], *outer.weight.shape[2:], r)
        outer.weight.copy_(side.movedim(-1, 1))
        if layer.bias is not None:
            assert outer.bias is not None
            outer.bias.copy_(layer.bias).requires_grad_(layer.bias.requires_grad)
    return Factored(inner, outer).train(layer.training)


def _number(name: str, rank: int | float, full: int) -> int:
    if isinstance(rank, float) and rank <= 1:
        return max(1, round(rank * full))
    if rank != int(rank) or rank > full:
        raise UsageError(
            f"rank is {rank:g}, and '{name}' has a full one of {full}",
            todo="give a smaller one, or a part as 0.5, or name the layer in `leave`",
        )
    return int(rank)


def _two(layer: Layer, rank: int, window: Window) -> tuple[Layer, Layer]:
    """Two layers of no weights yet, on the layer's device, of its dtype."""
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        linear = partial(nn.utils.skip_init, nn.Linear, **like)
        return linear(layer.in_features, rank, bias=False), linear(rank, layer.out_features, bias=biased)
    numbers = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    slides: dict[str, Any] = {name: getattr(layer, name) for name in numbers}
    point: dict[str, Any] = {"kernel_size": 1}
    first, second = (slides, point) if window == "first" else (point, slides)
    conv = partial(nn.utils.skip_init, type(layer), **like)
    return conv(layer.in_channels, rank, bias=False, **first), conv(rank, layer.out_channels, bias=biased, **second)
