"""What a trace assumed of the free sizes: `if x.shape[0] % 8 == 0` takes one branch, and the graph holds that one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.errors import LoadError, UnsupportedError
from graphopt.fake import Shapes, dim_of
from graphopt.ops import arguments
from graphopt.signature import Dim, Range, Signature, TensorSpec, size_of

__all__ = ["conditions", "squeezed"]

_SQUEEZES = ("squeeze", "squeeze_copy")


def conditions(
    guards: Sequence[str], signature: Signature, in_spec: pytree.TreeSpec, arguments: Sequence[str]
) -> tuple[str, ...]:
    """The guards that torch.export collected, in the names of the signature; what holds by itself is left out.

    Args:
        guards: such as `(L['x'].size()[0] % 8) == 0`.
        arguments: names of the arguments of forward.

    Raises:
        UnsupportedError: for a guard on anything but sizes of the inputs.
    """
    sizes = _size_texts(signature, in_spec, arguments)
    found: dict[str, None] = {}
    for guard in guards:
        text = guard
        for place, size in sizes.items():
            text = text.replace(place, size if isinstance(size, str) and size.isidentifier() else f"({size})")
        left, _, right = text.partition(" == ")
        if left == right:
            continue
        try:
            size_of(text, dict.fromkeys(signature.ranges, 2))
        except ZeroDivisionError:
            pass  # two is no size that the guard is about
        except LoadError as error:
            raise UnsupportedError(
                f"the model decides by its inputs in a way that no graph can hold: {guard}",
                todo="leave fewer sizes free in `dynamic`, or move the decision out of forward",
            ) from error
        found[text] = None
    return tuple(found)


def squeezed(graph: fx.Graph, shapes: Shapes, ranges: Mapping[str, Range]) -> tuple[str, ...]:
    """`batch != 1` for every free size that the graph squeezes: an axis of size one would go, the graph keeps it.

    torch takes a free size for two or more and collects no guard here. For sizes such as `batch - 1` it collects one.
    """
    found: dict[str, None] = {}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._opname not in _SQUEEZES:
            continue
        given = arguments(node)
        shape = given["self"].meta["val"].shape
        dims = given.get("dim", range(len(shape)))
        for axis in [dims] if isinstance(dims, int) else dims:
            size = dim_of(shape[axis], shapes) if shape else 0  # squeeze(0) of a lone number is allowed
            if size in ranges and ranges[str(size)].min <= 2:
                found[f"{size} != 1"] = None
    return tuple(found)


def _size_texts(signature: Signature, in_spec: pytree.TreeSpec, arguments: Sequence[str]) -> dict[str, Dim]:
    """How torch writes the size of each axis of each input, and what the signature calls it."""
    args, kwargs = pytree.tree_unflatten(list(signature.inputs), in_spec)
    by_name = dict(zip(arguments, (*args, *kwargs.values()), strict=False))
    texts = {
        f"L{pytree.keystr(path)}.size()[{axis}]": dim
        for path, spec in pytree.tree_flatten_with_path(by_name)[0]
        if isinstance(spec, TensorSpec)
        for axis, dim in enumerate(spec.dims)
    }
    # The second of `*more` is the argument `more_1` of the graph and `more[1]` in a guard.
    return texts | {re.sub(r"^L\['(\w+)_(\d+)'\]", r"L['\1'][\2]", text): dim for text, dim in texts.items()}
