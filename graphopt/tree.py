"""Nested inputs and outputs without torch: tuples, lists and dicts described by the JSON text of a pytree spec.

Torch's own pytree code is used only for other containers (dataclasses, model outputs), and only when the process has
imported torch already.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from graphopt.errors import InputError

__all__ = ["flatten", "unflatten"]

_CONTAINERS: dict[str, type] = {
    "builtins.tuple": tuple,
    "builtins.list": list,
    "builtins.dict": dict,
    "collections.OrderedDict": OrderedDict,
}


@dataclass(frozen=True)
class _Spec:
    """One node of the structure; `kind` is None for a leaf."""

    kind: str | None
    keys: tuple[str, ...]
    children: tuple[_Spec, ...]

    @property
    def plain(self) -> bool:
        return (self.kind is None or self.kind in _CONTAINERS) and all(child.plain for child in self.children)

    def __str__(self) -> str:
        parts = [str(child) for child in self.children]
        if self.kind is None:
            return "*"
        if self.keys:
            return "{" + ", ".join(f"{key}: {part}" for key, part in zip(self.keys, parts, strict=True)) + "}"
        return f"[{', '.join(parts)}]" if self.kind == "builtins.list" else f"({', '.join(parts)})"


@lru_cache(maxsize=256)
def _parsed(text: str) -> _Spec:
    """A structure is read once: artifacts ask for theirs in every call."""
    return _read(json.loads(text)[1])


def _read(row: Any) -> _Spec:
    context = json.loads(row["context"]) if row["context"] else None
    keys = tuple(context) if isinstance(context, list) and row["type"] in _CONTAINERS else ()
    return _Spec(row["type"], keys, tuple(_read(child) for child in row["children_spec"]))


def flatten(value: Any, text: str) -> list[Any]:
    """The leaves of `value`, which must have the structure that `text` describes.

    Raises:
        InputError: when it has another structure.
    """
    spec = _parsed(text)
    if spec.plain:
        return list(_leaves(value, spec))
    return _pytree_flatten(value, text)


def _leaves(value: Any, spec: _Spec) -> Iterator[Any]:
    if spec.kind is None:
        if isinstance(value, tuple | list | dict):
            raise _mismatch(value, spec)
        yield value
        return
    kind: type = type(value)
    if kind is not _CONTAINERS[spec.kind] or len(value) != len(spec.children):
        raise _mismatch(value, spec)
    if spec.keys and set(value) != set(spec.keys):
        raise _mismatch(value, spec)
    parts = [value[key] for key in spec.keys] if spec.keys else list(value)
    for part, child in zip(parts, spec.children, strict=True):
        yield from _leaves(part, child)


def _mismatch(value: Any, spec: _Spec) -> InputError:
    size = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return InputError(
        f"an input is a {type(value).__name__}{size} where the model takes {spec}",
        todo="call the artifact as the model is called",
    )


def unflatten(leaves: list[Any], text: str) -> Any:
    """Rebuild a structure from its leaves; a flat tuple when it needs a container that only torch knows."""
    spec = _parsed(text)
    if spec.plain:
        rest = iter(leaves)
        return _build(spec, rest)
    if "torch" not in sys.modules:
        return tuple(leaves)
    from torch.utils import _pytree as pytree

    return pytree.tree_unflatten(leaves, pytree.treespec_loads(text))


def _build(spec: _Spec, leaves: Iterator[Any]) -> Any:
    if spec.kind is None:
        return next(leaves)
    parts = [_build(child, leaves) for child in spec.children]
    if spec.kind.endswith(("dict", "Dict")):
        return _CONTAINERS[spec.kind](zip(spec.keys, parts, strict=True))
    return _CONTAINERS[spec.kind](parts)


def _pytree_flatten(value: Any, text: str) -> list[Any]:
    if "torch" not in sys.modules:
        raise InputError(
            "the model's inputs are nested in containers that only torch knows",
            todo="pass the tensors by position or by name",
        )
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten(value)
    wanted = pytree.treespec_loads(text)
    if spec != wanted:
        raise InputError(f"the inputs have the structure {spec}, the model takes {wanted}")
    return leaves
