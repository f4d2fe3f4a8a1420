"""The algebra of reshapes and permutations: every output axis as digits of the input's row-major index.

A tensor of shape [d0, d1, ..] numbers its elements 0 .. N-1 in row-major order. After reshapes and permutations each
axis is a list of digits (size, stride): the element at digits (i1, i2, ..) has the number sum of ik * stride_k. So
[2, 3] is ((2, 3),), ((3, 1),); its transpose is ((3, 1),), ((2, 3),); that flattened is ((3, 1), (2, 3)). A reshape
concatenates all digits, joins neighbours that count on ((a, s * b), (b, s) is (a * b, s)) and splits them anew; a
permutation reorders axes. Sizes may be symbolic: only exact division is used, and equality of expressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from graphopt.ops import Size, product

__all__ = ["Digit", "Plan", "Renumbering", "plan", "quotient"]

Digit: TypeAlias = tuple[Size, Size]
Shape: TypeAlias = tuple[Size, ...]


@lru_cache(maxsize=65536)
def quotient(a: Size, b: Size) -> Size | None:
    """a / b where that is a whole number whatever the symbols stand for, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio: Any = a / b
    if not ratio.is_integer:
        return None
    whole: Size = int(ratio) if ratio.is_Integer else ratio
    return whole


@lru_cache(maxsize=65536)
def _product(*sizes: Size) -> Size:
    """Product in a normal form, so that equal products are equal expressions."""
    total = product(sizes)
    return total if isinstance(total, int) else total.expand()


@dataclass(frozen=True)
class Renumbering:
    """What a chain of reshapes and permutations does to a tensor of shape `source`."""

    source: Shape
    axes: tuple[tuple[Digit, ...], ...]

    @classmethod
    def identity(cls, source: Shape) -> Renumbering:
        return cls(source, tuple(_row_major(source)))

    @property
    def shape(self) -> Shape:
        return tuple(_product(*(size for size, _ in axis)) for axis in self.axes)

    def permuted(self, order: Sequence[int]) -> Renumbering:
        return Renumbering(self.source, tuple(self.axes[axis] for axis in order))

    def reshaped(self, shape: Shape) -> Renumbering | None:
        """None when an axis of `shape` begins or ends inside a digit."""
        axes = _split(self.digits(), shape)
        return None if axes is None else Renumbering(self.source, axes)

    def digits(self) -> tuple[Digit, ...]:
        """All digits in order, joined as far as they count on."""
        return _joined(tuple(digit for axis in self.axes for digit in axis))


@lru_cache(maxsize=65536)
def _joined(digits: tuple[Digit, ...]) -> tuple[Digit, ...]:
    joined: list[Digit] = []
    for size, stride in digits:
        if joined and joined[-1][1] == _product(size, stride):
            joined[-1] = (_product(joined[-1][0], size), stride)
        else:
            joined.append((size, stride))
    return tuple(joined)


def _row_major(shape: Shape) -> list[tuple[Digit, ...]]:
    """Every axis of a tensor in order as one digit; an axis of size one has none."""
    axes: list[tuple[Digit, ...]] = []
    stride: Size = 1
    for size in reversed(shape):
        axes.append(() if size == 1 else ((size, stride),))
        stride = _product(stride, size)
    return axes[::-1]


@lru_cache(maxsize=65536)
def _split(digits: tuple[Digit, ...], shape: Shape) -> tuple[tuple[Digit, ...], ...] | None:
    left = list(reversed(digits))
    axes = []
    for size in shape:
        axis = _take(left, size)
        if axis is None:
            return None
        axes.append(tuple(axis))
    return None if left else tuple(axes)


def _take(digits: list[Digit], size: Size) -> list[Digit] | None:
    """Digits of product `size` off the end of `digits`, the last of which is split where needed."""
    taken: list[Digit] = []
    while size != 1:
        if not digits:
            return None
        (length, stride) = digits.pop()
        rest = quotient(size, length)
        if rest is not None:
            taken.append((length, stride))
            size = rest
            continue
        inner = quotient(length, size)
        if inner is None:
            return None
        taken.append((size, _product(stride, inner)))
        digits.append((inner, stride))
        return taken
    return taken


@dataclass(frozen=True)
class Plan:
    """A renumbering as at most three calls: reshape to `split`, permute by `order`, reshape to `shape`.

    None leaves a call out. `cost` counts a reshape once and a permutation, which moves memory, twice.
    """

    split: Shape | None
    order: tuple[int, ...] | None
    shape: Shape | None

    @property
    def calls(self) -> int:
        return sum(part is not None for part in (self.split, self.order, self.shape))

    @property
    def cost(self) -> int:
        return self.calls + (self.order is not None)


@lru_cache(maxsize=65536)
def plan(what: Renumbering) -> Plan | None:
    """The cheapest calls that do `what`; None when symbolic strides cannot be followed."""
    target = what.shape
    digits = what.digits()
    if len(digits) <= 1:
        return Plan(None, None, None if target == what.source else target)
    candidates = [
        _reshape_then_permute(what),
        _permute_then_reshape(digits, what.source, target),
        _general(digits, what.source, target),
    ]
    return min((found for found in candidates if found is not None), key=lambda found: found.cost, default=None)


def _permute_then_reshape(digits: tuple[Digit, ...], source: Shape, target: Shape) -> Plan | None:
    """Possible when the digits are whole axes of the source."""
    strides = {axis[0][1]: i for i, axis in enumerate(_row_major(source)) if axis}
    moved: list[int] = []
    for size, stride in digits:
        run: list[int] = []
        covered: Size = 1
        while covered != size:
            axis = strides.get(_product(stride, covered))
            if axis is None:
                return None
            run.append(axis)
            covered = _product(covered, source[axis])
        moved += reversed(run)
    order = _with_units(moved, source, target)
    permuted = tuple(source[axis] for axis in order)
    return Plan(None, order, None if permuted == target else target)


def _reshape_then_permute(what: Renumbering) -> Plan | None:
    """Possible when every output axis is one digit."""
    axes = [_joined(axis) for axis in what.axes]
    ordered = _in_order([digit for axis in axes for digit in axis])
    if ordered is None or any(len(axis) > 1 for axis in axes):
        return None
    ranks = {digit: rank for rank, digit in enumerate(ordered)}
    # An axis of size one goes where its neighbour to the left goes, so that it moves only when that one moves.
    keys, last = [], -1
    for axis in axes:
        last = ranks[axis[0]] if axis else last
        keys.append(last)
    sequence = sorted(range(len(axes)), key=lambda axis: (keys[axis], axis))
    split = tuple(what.shape[axis] for axis in sequence)
    order = tuple(sequence.index(axis) for axis in range(len(axes)))
    return Plan(None if split == what.source else split, order, None)


def _general(digits: tuple[Digit, ...], source: Shape, target: Shape) -> Plan | None:
    ordered = _in_order(digits)
    if ordered is None:
        return None
    split = tuple(size for size, _ in ordered)
    order = tuple(ordered.index(digit) for digit in digits)
    permuted = tuple(size for size, _ in digits)
    return Plan(None if split == source else split, order, None if permuted == target else target)


def _in_order(digits: Sequence[Digit]) -> list[Digit] | None:
    """The same digits as the source has them, found by following strides: symbolic ones cannot be compared."""
    by_stride = {stride: (size, stride) for size, stride in digits}
    found: list[Digit] = []
    stride: Size = 1
    while len(found) < len(digits):
        digit = by_stride.get(stride)
        if digit is None:
            return None
        found.append(digit)
        stride = _product(*digit)
    return found[::-1]


def _with_units(order: list[int], source: Shape, target: Shape) -> tuple[int, ...]:
    """`order`, the source axes of more than one element, completed by the axes of size one of the source.

    They are put where the target has axes of size one as far as there are any, the others at the end.
    """
    units = [axis for axis, size in enumerate(source) if size == 1]
    rest, full = iter(order), []
    for size in target:
        if size == 1 and units:
            full.append(units.pop(0))
        elif size != 1:
            full += [axis for axis in [next(rest, None)] if axis is not None]
    return (*full, *rest, *units)
