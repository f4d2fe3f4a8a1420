"""Numbers that modules keep beside their tensors: those that torch's layers derive, and those worth a try in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, islice, product
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from graphopt.errors import UnsupportedError
from graphopt.model import Model
from graphopt.ops import argument
from graphopt.printer import module_path

__all__ = ["Numbers", "choices", "derived", "facts", "is_derived", "nodes_below"]

Numbers = dict[tuple[str, str], Any]
"""Values of attributes by the path of the module and the name."""

_MOST_CHOICES = 300
_CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict


def nodes_below(model: Model, path: str) -> list[Node]:
    """The calls that a module and its children have made."""
    calls = [node for node in model.graph.nodes if node.op == "call_function"]
    return [n for n in calls if not path or module_path(n) == path or module_path(n).startswith(f"{path}.")]


# Torch's own layers


def derived(model: Model, module: nn.Module) -> Numbers:
    """What the numbers of torch's layers have to be for the tensors that they hold, where it is not what they are.

    Raises:
        UnsupportedError: for a layer that cannot say what it is now.
    """
    arguments = _arguments(model)
    found: Numbers = {}
    for path, owner in module.named_modules():
        for kind, numbers in _DERIVED:
            if isinstance(owner, kind):
                values = numbers(owner, {**arguments.get(path, {}), "path": path})
                found |= {(path, name): value for name, value in values.items() if getattr(owner, name) != value}
    return found


def is_derived(module: nn.Module) -> bool:
    """Whether the numbers of a module follow from its tensors, so that none has to be searched for."""
    return isinstance(module, tuple(kind for kind, _ in _DERIVED)) and not isinstance(module, nn.MultiheadAttention)


def _arguments(model: Model) -> dict[str, dict[str, Any]]:
    """Numbers that stand in calls of layers, by the path of the layer: groups, and what a norm goes over."""
    found: dict[str, dict[str, Any]] = {}
    for node in model.graph.nodes:
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        names = {arg.name for arg in schema.arguments} if schema is not None else set()
        wanted = names & {"groups", "num_groups", "normalized_shape"}
        if not wanted:
            continue
        weight = argument(node, "weight")
        stored = isinstance(weight, Node) and weight.op == "get_attr"
        paths = [name.rpartition(".")[0] for name in model.params.aliases(str(weight.target))] if stored else []
        source = node.all_input_nodes[0].meta["val"]
        values = {name: argument(node, name) for name in wanted}
        for path in paths or [module_path(node)]:
            found[path] = values | {"channels": source.shape[1] if source.dim() > 1 else None}
    return found


def _convolution(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    groups = given.get("groups", layer.groups)
    first, second = layer.weight.shape[:2]
    if isinstance(layer, _ConvTransposeNd):
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}


def _group_norm(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    channels = given.get("channels") if layer.weight is None else layer.weight.shape[0]
    return {"num_channels": channels or layer.num_channels, "num_groups": given.get("num_groups", layer.num_groups)}


def _trailing_norm(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    shape = given.get("normalized_shape", layer.normalized_shape) if layer.weight is None else layer.weight.shape
    return {"normalized_shape": tuple(shape)}


def _statistics(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    own = layer.weight if layer.weight is not None else layer.running_mean
    return {} if own is None else {"num_features": own.shape[0]}


def _attention(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Torch's attention has as many features inside as its input has, in heads of equal size."""
    width = layer.out_proj.weight.shape[0]
    if layer.in_proj_weight is not None:
        inside, inputs = layer.in_proj_weight.shape[0] // 3, (layer.in_proj_weight.shape[1],) * 2
    else:
        inside, inputs = layer.q_proj_weight.shape[0], (layer.k_proj_weight.shape[1], layer.v_proj_weight.shape[1])
    if not inside == width == layer.out_proj.weight.shape[1]:
        raise UnsupportedError(
            "nn.MultiheadAttention has as many features in its heads as it takes and makes: the model has "
            f"{inside} in the heads and makes {width}",
            where=f"module '{given['path']}'",
            todo="leave out the groups of its heads and of its input (`graphopt groups`; prune-channels{leave=...})",
        )
    return {"embed_dim": width, "kdim": inputs[0], "vdim": inputs[1], "head_dim": width // layer.num_heads}


_DERIVED: tuple[tuple[type[nn.Module], Callable[[Any, dict[str, Any]], dict[str, Any]]], ...] = (
    (nn.Linear, lambda m, _: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]}),
    (
        nn.Bilinear,
        lambda m, _: dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True)),
    ),
    (nn.Embedding, lambda m, _: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
    (nn.EmbeddingBag, lambda m, _: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
    (nn.PReLU, lambda m, _: {"num_parameters": m.weight.shape[0]}),
    (_ConvNd, _convolution),
    (_NormBase, _statistics),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _trailing_norm),
    (nn.RMSNorm, _trailing_norm),
    (nn.MultiheadAttention, _attention),
)
"""Kinds of layers, and what their numbers are for their tensors and the arguments of their calls."""


# Everyone else's


def facts(before: nn.Module, after: nn.Module) -> dict[int, set[int]]:
    """What the sizes have become that have changed, in the tensors of a module itself and of its direct children."""
    found: dict[int, set[int]] = {}
    for old, new in zip(_near(before), _near(after), strict=True):
        for size, left in zip(old.shape, new.shape, strict=True):
            if size != left:
                found.setdefault(size, set()).add(left)
    return found


def _near(module: nn.Module) -> Iterator[Tensor]:
    for owner in (module, *module.children()):
        yield from owner.parameters(recurse=False)
        yield from owner.buffers(recurse=False)
        if owner is not module and isinstance(owner, _CONTAINERS):
            for child in owner.children():
                yield from _near(child)


def choices(module: nn.Module, sizes: dict[int, set[int]], nodes: list[Node]) -> Iterator[dict[str, Any]]:
    """New values for attributes of a module, fewest first, that may fit sizes that have changed.

    A width becomes the new width, and a divisor of it, such as a number of heads, shrinks as it has; both have to
    be numbers of the calls that the module has made.
    """
    written = {leaf for node in nodes for leaf in pytree.tree_leaves((node.args, node.kwargs)) if type(leaf) is int}
    written.update(*sizes.values())
    options = {}
    for name, value in vars(module).items():
        new = [one for one in _news(value, sizes) if set(_numbers(one)) <= written | set(_numbers(value))]
        if new:
            options[name] = new
    yield from islice(_combined(options), _MOST_CHOICES)


def _combined(options: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for count in range(1, 4):
        for names in combinations(options, count):
            for values in product(*(options[name] for name in names)):
                yield dict(zip(names, values, strict=True))


def _news(value: Any, sizes: dict[int, set[int]]) -> list[Any]:
    if type(value) is int and value > 1:
        exact = sorted(sizes.get(value, ()))
        shrunk = {value * n // old for old, new in sizes.items() for n in new if old % value == 0 == value * n % old}
        return [*exact, *sorted(shrunk - {0, value, *exact})]
    if type(value) in (tuple, list) and value and all(type(one) is int for one in value):
        pairs = [(old, n) for old, new in sizes.items() for n in new if old in value]
        return [type(value)(n if one == old else one for one in value) for old, n in pairs]
    return []


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
