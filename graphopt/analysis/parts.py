"""Disjoint sets of numbers, many of them joined at once."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = ["Parts"]


class Parts:
    """The numbers from 0 to `count` - 1, each in a part of its own until it is joined with others."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def find(self, values: np.ndarray) -> np.ndarray:
        """A number that stands for the part of each value, equal for values of one part."""
        roots: np.ndarray = self._parent[values]
        while not np.array_equal(deeper := self._parent[roots], roots):
            roots = deeper
        self._parent[values] = roots
        return roots

    def join(self, values: np.ndarray, sets: np.ndarray) -> None:
        """Join the parts of all values whose number in `sets` is the same."""
        if not values.size:
            return
        roots, place = np.unique(self.find(values), return_inverse=True)
        _, component = self._components(place, sets, roots.size)
        lowest = np.full(component.max() + 1, self._parent.size)
        np.minimum.at(lowest, component, roots)
        self._parent[roots] = lowest[component]

    def left_after(self, values: np.ndarray, sets: np.ndarray) -> int:
        """How many parts the values would be in if they were joined."""
        roots, place = np.unique(self.find(values), return_inverse=True)
        return self._components(place, sets, roots.size)[0] if values.size else 0

    @staticmethod
    def _components(place: np.ndarray, sets: np.ndarray, count: int) -> tuple[int, np.ndarray]:
        """The number of components of values and sets, and that of each value."""
        codes = np.unique(sets * count + place)
        sets, place = codes // count, codes % count
        member = np.cumsum(np.diff(sets, prepend=sets[:1]) != 0)
        size = count + int(member[-1]) + 1
        edges = coo_matrix((np.ones(place.size, np.int8), (place, member + count)), shape=(size, size))
        found, component = connected_components(edges, directed=False)
        return found, component[:count]
