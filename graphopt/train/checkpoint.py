"""Checkpoints of a training: nested state as JSON with its tensors as safetensors, in one file, without pickle."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from graphopt.errors import LoadError
from graphopt.files import write_whole

__all__ = ["load_checkpoint", "save_checkpoint"]

_TREE = "tree"


def save_checkpoint(path: str | PathLike[str], state: Any) -> None:
    """Write dicts, lists, tuples, numbers, strings, None and tensors, nested at will. A kill leaves the file that was
    there before.

    Raises:
        TypeError: for anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_packed(state, tensors))
    with write_whole(path) as scratch:
        save_file(tensors, scratch, metadata={_TREE: tree})


def load_checkpoint(path: str | PathLike[str]) -> Any:
    """What was saved; tensors are on the CPU.

    Raises:
        LoadError: when the file is no checkpoint, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict, it has no __iter__
            return _unpacked(json.loads((file.metadata() or {})[_TREE]), tensors)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise LoadError(
            "this is no checkpoint of a training, or it is damaged",
            where=str(Path(path)),
            why=str(error),
            todo="delete it to train from the start",
        ) from error


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON in which [kind, content] stands for what JSON does not have."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors takes no two views of one storage
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_packed(item, tensors) for item in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a checkpoint")


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
