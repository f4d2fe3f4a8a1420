"""What makes two nodes look alike, at four levels of detail, and fingerprints of tensors that read next to nothing."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import torch

from graphopt.diff.view import Item, View, family

__all__ = ["LEVELS", "Fingerprint", "Interner", "Level", "fingerprint", "labels_of"]

Level = Literal["full", "structure", "operator", "family"]
LEVELS: tuple[Level, ...] = ("full", "structure", "operator", "family")

_WHOLE = 4096
"""Tensors of up to this many elements are looked at as a whole."""
_CORNER = 4
_RUN = 16


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A digest of some elements: equal for equal tensors, and for a matrix and its transposition.

    `plain`: it says nothing, because the elements are all the same (biases of zero) or there are none.
    """

    digest: bytes
    plain: bool


class Interner:
    """Small numbers for keys: equal keys have equal numbers, and unequal ones never do, as hashes might."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """The digest of a tensor; of a large one, of the corners and the middle, so that little of a file is read."""
    if tensor.device.type == "meta" or not tensor.numel():
        return Fingerprint(repr((tuple(sorted(tensor.shape)), str(tensor.dtype))).encode(), True)
    tensor = tensor.detach()
    sample = _sample(tensor)
    texts = [_bytes(sample)]
    if sample.dim() >= 2:
        texts.append(_bytes(sample.mT))
    state = blake2b(min(texts), digest_size=16)
    state.update(repr((tensor.numel(), str(tensor.dtype))).encode())
    flat = sample.reshape(-1)
    plain = tensor.numel() == 1 or bool((flat == flat[0]).all())
    return Fingerprint(state.digest(), plain)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    shape = [size for size in tensor.shape if size != 1]
    if len(shape) == 2:
        tensor = tensor.reshape(shape)
        if tensor.numel() <= _WHOLE:
            return tensor
        # The same places are read of a matrix and of its transposition.
        starts = [(0, 0), (shape[0] // 2, shape[1] // 2), (max(shape[0] - _CORNER, 0), max(shape[1] - _CORNER, 0))]
        blocks = [tensor[i : i + _CORNER, j : j + _CORNER] for i, j in starts]
        size = min(min(block.shape) for block in blocks)
        return torch.stack([block[:size, :size] for block in blocks])
    flat = tensor.reshape(-1)
    if flat.numel() <= _WHOLE:
        return flat
    starts_1d = (0, flat.numel() // 3, flat.numel() * 2 // 3, flat.numel() - _RUN)
    return torch.cat([flat[start : start + _RUN] for start in starts_1d])


def _bytes(tensor: torch.Tensor) -> bytes:
    # numpy has no bfloat16, and every dtype has bytes.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def labels_of(view: View, level: Level, marks: dict[int, Fingerprint], intern: Interner) -> list[int]:
    """A number for every item; items look alike at a level if their numbers are equal.

    Args:
        marks: the fingerprints of the tensor items, by index.
    """
    return [intern((level, *_label(view, item, level, marks))) for item in view.items]


def _label(view: View, item: Item, level: Level, marks: dict[int, Fingerprint]) -> tuple[Hashable, ...]:
    if item.kind != "call":
        return (item.kind, item.shape) if level == "full" else (item.kind,)
    if level == "operator":
        # Adding a bias is another thing than adding two branches.
        return ("call", item.operator, sum(1 for _ in view.data_operands(item.index)))
    if level == "family":
        return ("call", family(item.operator))
    stored = [(slot, source) for slot, source in item.operands if view.items[source].kind == "tensor"]
    if level == "structure":
        attributes = tuple((key, value) for key, value in item.attributes.items() if key not in item.sizes)
        return ("call", item.operator, attributes, tuple(slot for slot, _ in stored))
    content = tuple((slot, marks[source].digest, view.items[source].shape) for slot, source in stored)
    return ("call", item.operator, tuple(item.attributes.items()), item.shape, content)
