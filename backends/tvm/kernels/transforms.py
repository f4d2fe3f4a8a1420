"""The transforms of Winograd's convolution with windows of three, along one axis.

With the points 0, 1, -1 (and 2, -2 for squares of four) and infinity; see Lavin and Gray, 2016, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["SQUARES", "Transform"]

Name = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Transform:
    """Squares of m outputs from m + 2 inputs.

    Attributes:
        weights: G [m + 2, 3].
        input: B^T applied to m + 2 values.
        output: A^T applied to m + 2 values, giving m.
    """

    weights: tuple[tuple[float, ...], ...]
    input: Callable[[Sequence[Any], Name], list[Any]]
    output: Callable[[Sequence[Any], Name], list[Any]]

    @property
    def back(self) -> Any:
        """The matrix [3, m + 2] that undoes G."""
        return np.linalg.pinv(np.array(self.weights))


def _input_of_two(x: Sequence[Any], name: Name) -> list[Any]:
    return [name("t", value) for value in (x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3])]


def _output_of_two(x: Sequence[Any], name: Name) -> list[Any]:
    return [name("t", value) for value in (x[0] + x[1] + x[2], x[1] - x[2] - x[3])]


def _input_of_four(x: Sequence[Any], name: Name) -> list[Any]:
    even, odd = name("t", x[4] - x[2] * _k(4.0, x)), name("t", x[3] - x[1] * _k(4.0, x))
    wide, narrow = name("t", x[4] - x[2]), name("t", (x[3] - x[1]) * _k(2.0, x))
    values = (
        x[0] * _k(4.0, x) - x[2] * _k(5.0, x) + x[4],
        even + odd,
        even - odd,
        wide + narrow,
        wide - narrow,
        x[1] * _k(4.0, x) - x[3] * _k(5.0, x) + x[5],
    )
    return [name("t", value) for value in values]


def _output_of_four(x: Sequence[Any], name: Name) -> list[Any]:
    near_sum, near_gap = name("t", x[1] + x[2]), name("t", x[1] - x[2])
    far_sum, far_gap = name("t", x[3] + x[4]), name("t", x[3] - x[4])
    values = (
        x[0] + near_sum + far_sum,
        near_gap + far_gap * _k(2.0, x),
        near_sum + far_sum * _k(4.0, x),
        near_gap + far_gap * _k(8.0, x) + x[5],
    )
    return [name("t", value) for value in values]


def _k(value: float, like: Sequence[Any]) -> Any:
    """A constant of the type of the values."""
    from tvm import tirx

    kind = like[0].ty
    lanes = kind.lanes if hasattr(kind, "lanes") else 1
    constant = tirx.const(value, "float32")
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)


SQUARES = {
    2: Transform(((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)), _input_of_two, _output_of_two),
    4: Transform(
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        _input_of_four,
        _output_of_four,
    ),
}
"""The transforms by the side of their squares."""
