"""Sums of sizes that may be symbolic, and their values once the symbols have numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.ops import Size, numel, product

if TYPE_CHECKING:
    import sympy

__all__ = ["Evaluator", "Renamer", "Sum", "Volume", "Volumes", "total"]


@dataclass(frozen=True)
class Volume:
    """One tensor's elements and bytes."""

    elements: Size
    bytes: Size


class Sum:
    """A sum of many sizes, most of them numbers or one of a few expressions, added up only when asked for."""

    def __init__(self, sizes: Iterable[Size] = ()) -> None:
        self._number = 0
        self._terms: dict[sympy.Expr, int] = {}
        for size in sizes:
            self.add(size)

    def add(self, size: Size) -> None:
        if isinstance(size, int):
            self._number += size
        else:
            self._terms[size] = self._terms.get(size, 0) + 1

    def merge(self, other: Sum) -> None:
        """Add everything that `other` sums."""
        self._number += other._number
        for term, count in other._terms.items():
            self._terms[term] = self._terms.get(term, 0) + count

    def total(self) -> Size:
        """The sum, an int when no term is symbolic."""
        if not self._terms:
            return self._number
        import sympy

        return sympy.Add(self._number, *(count * term for term, count in self._terms.items()))


@lru_cache(maxsize=65536)
def total(sizes: tuple[Size, ...]) -> Size:
    """The sum of a few sizes; graphs repeat the same few over and over."""
    return Sum(sizes).total()


class Renamer:
    """Puts a signature's names in place of the shape symbols of torch."""

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        self._names = names
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._done: dict[sympy.Expr, sympy.Expr] = {}

    def __call__(self, size: Size) -> Size:
        if isinstance(size, int):
            return size
        if size not in self._done:
            for symbol in size.free_symbols:
                self._symbols.setdefault(symbol, self._renamed(symbol))
            self._done[size] = size.xreplace(self._symbols)
        return self._done[size]

    def _renamed(self, symbol: sympy.Symbol) -> sympy.Symbol:
        import sympy

        return sympy.Symbol(self._names.get(symbol, str(symbol)), integer=True, positive=True)


class Evaluator:
    """The value of a size at given sizes of the names in it."""

    def __init__(self, at: Mapping[str, int]) -> None:
        self._at = dict(at)
        self._done: dict[sympy.Expr, int] = {}

    def __call__(self, size: Size) -> int:
        """The number; a name that was not given counts as 1."""
        if isinstance(size, int):
            return size
        if size not in self._done:
            values = {symbol: self._at.get(str(symbol), 1) for symbol in size.free_symbols}
            self._done[size] = int(size.subs(values))
        return self._done[size]


class Volumes:
    """The volumes of the tensors that each node makes, in the signature's names. Equal values are one object in most
    graphs (`Shapes` sees to it), so each object is looked at once."""

    def __init__(self, rename: Renamer) -> None:
        self._rename = rename
        self._seen: dict[int, tuple[Volume, ...]] = {}
        self._bytes: dict[int, Size] = {}

    def __call__(self, node: Node) -> tuple[Volume, ...]:
        """One volume for every tensor in the node's value; none where it makes a size or a number."""
        value = node.meta.get("val")
        if id(value) not in self._seen:
            self._seen[id(value)] = tuple(self._volumes(value))
        return self._seen[id(value)]

    def bytes(self, node: Node) -> Size:
        """Bytes of all tensors that the node makes."""
        key = id(node.meta.get("val"))
        if key not in self._bytes:
            self._bytes[key] = total(tuple(volume.bytes for volume in self(node)))
        return self._bytes[key]

    def _volumes(self, value: Any) -> Iterable[Volume]:
        if isinstance(value, torch.Tensor):
            elements = self._rename(numel(value))
            yield Volume(elements, product((elements, value.element_size())))
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from self._volumes(item)
