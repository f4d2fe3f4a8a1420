"""What flows along the edges of an ONNX graph while it is executed: tensors, constants, and sizes known beforehand.

ONNX computes shapes with ordinary operators (`Shape`, `Gather`, `Mul`, `Cast`, `Concat`, ...). Run on tensors, they
would hide the sizes from the compiler; so they run on `Known` values: arrays of Python numbers, in which a dynamic
size is a `torch.SymInt` and a float computed from one is a `Ratio` of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Constant",
    "Floats",
    "Inexact",
    "Ints",
    "Known",
    "Number",
    "Operand",
    "Ratio",
    "Refusal",
    "Value",
    "refuse",
    "stored",
]

Ints = tuple[int, ...]
"""Integers known while importing; a `torch.SymInt` stands where a size is dynamic."""

Floats = tuple[float, ...]
"""Floats known while importing."""

Operand = Tensor | float
"""A tensor, or a plain number where a 0-d value is known while importing."""

LARGEST_EXACT = 1024
"""Largest numerator and denominator of a factor on a size: products of sizes below 2^14 stay exact in float32."""


class Refusal(Exception):
    """What an operator implementation raises on what it does not understand; the caller adds the node.

    `unknown` names a value that would have to be known while importing.
    """

    def __init__(self, why: str, todo: str | None = None, *, unknown: str | None = None) -> None:
        super().__init__(why)
        self.why, self.todo, self.unknown = why, todo, unknown


def refuse(why: str, todo: str | None = None) -> Refusal:
    """Reads as a sentence at the place of the `raise`."""
    return Refusal(why, todo)


class Inexact(Exception):
    """Shape arithmetic whose float rounding cannot be reproduced with integers."""


@dataclass(frozen=True)
class Ratio:
    """The float `num / den` where `num` is a dynamic size: exact as long as `den` is a power of two."""

    num: Any
    den: int = 1

    def times(self, factor: float) -> Ratio:
        p, q = float(factor).as_integer_ratio()
        if abs(p) > LARGEST_EXACT or q > LARGEST_EXACT or not self.dyadic:
            raise Inexact
        return Ratio(self.num * p, self.den * q)

    def over(self, divisor: float) -> Ratio:
        p, q = float(divisor).as_integer_ratio()
        if p <= 0 or max(p, q) > LARGEST_EXACT or not self.dyadic:
            raise Inexact
        return Ratio(self.num * q, self.den * p)

    def plus(self, term: float) -> Ratio:
        p, q = float(term).as_integer_ratio()
        if q > LARGEST_EXACT or not self.dyadic:
            raise Inexact
        return Ratio(self.num * q + p * self.den, self.den * q)

    @property
    def dyadic(self) -> bool:
        return self.den & (self.den - 1) == 0

    @property
    def floor(self) -> Any:
        return self.num // self.den

    @property
    def ceil(self) -> Any:
        return -((-self.num) // self.den)


def stored(number: float, dtype: torch.dtype) -> float | None:
    """A number as `dtype` holds it, without making a tensor, which tracing would record; None for other dtypes."""
    if dtype in (torch.int32, torch.int64):
        return int(number) if math.isfinite(number) else None
    if dtype is torch.bool:
        return bool(number)
    if dtype is torch.bfloat16:
        bits = int(np.float32(number).view(np.uint32))
        if not math.isfinite(number):
            return number
        bits += 0x7FFF + (bits >> 16 & 1)  # round to nearest, ties to even, then drop the lower half
        return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
    kinds: dict[torch.dtype, type[np.floating[Any]]] = {
        torch.float16: np.float16,
        torch.float32: np.float32,
        torch.float64: np.float64,
    }
    return float(kinds[dtype](number)) if dtype in kinds else None


Number = Any
"""int, bool, float, torch.SymInt or Ratio: an element of a Known array."""


@dataclass(frozen=True, eq=False)
class Known:
    """An array of numbers known while importing, with the dtype it has in the graph."""

    array: np.ndarray[Any, np.dtype[np.object_]]
    dtype: torch.dtype

    @staticmethod
    def of(numbers: list[Number] | tuple[Number, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Known:
        array = np.empty(len(numbers), dtype=object)
        for i, number in enumerate(numbers):  # one by one: numpy would turn a SymInt into an int
            array[i] = number
        return Known(array.reshape(shape), dtype)

    @staticmethod
    def from_tensor(tensor: Tensor) -> Known:
        return Known.of(tensor.reshape(-1).tolist(), tuple(tensor.shape), tensor.dtype)

    @property
    def numbers(self) -> list[Number]:
        return list(self.array.reshape(-1))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def concrete(self) -> bool:
        return not any(isinstance(number, torch.SymInt | Ratio) for number in self.numbers)

    def map(self, function: Callable[[Number], Number], dtype: torch.dtype | None = None) -> Known:
        return Known.of([function(number) for number in self.numbers], self.shape, dtype or self.dtype)

    def tensor(self) -> Tensor:
        """The same values as a tensor; dynamic sizes become `scalar_tensor` calls in the captured graph."""
        if self.concrete:
            if not self.shape:
                return torch.scalar_tensor(self.numbers[0], dtype=self.dtype)
            return torch.tensor(self.array.tolist(), dtype=self.dtype).reshape(self.shape)
        parts = [self._scalar(number) for number in self.numbers]
        return parts[0] if not self.shape else torch.stack(parts).reshape(self.shape)

    def _scalar(self, number: Number) -> Tensor:
        if isinstance(number, Ratio):
            return torch.scalar_tensor(number.num, dtype=self.dtype) / number.den
        return torch.scalar_tensor(number, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor stored in the file, or computed from such tensors alone, under its ONNX name.

    `known` holds its values as numbers, read beforehand as tracing would record the reading; it is None for a tensor
    too large to be a shape, or of complex numbers.
    """

    name: str
    tensor: Tensor
    known: Known | None

    LARGEST_KNOWN: ClassVar[int] = 4096

    @staticmethod
    def of(name: str, tensor: Tensor) -> Constant:
        small = tensor.numel() <= Constant.LARGEST_KNOWN and not tensor.dtype.is_complex
        return Constant(name, tensor, Known.from_tensor(tensor) if small else None)


Value = Tensor | Known | Constant
