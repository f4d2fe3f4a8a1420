"""The geometry of a two-dimensional window (convolution, pooling) over channels-last data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """Sizes along the two image axes, as (rows, columns).

    Attributes:
        size: of the input.
        result: of the output.
        kernel, stride, dilation: of the window.
        before: padding at the near end; what is missing at the far end is padding too.
    """

    size: tuple[int, int]
    result: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    dilation: tuple[int, int]

    def notes(self) -> dict[str, Any]:
        """Annotations from which `read` makes the window again."""
        names = {
            "window": self.kernel,
            **{n: getattr(self, n) for n in ("size", "result", "stride", "before", "dilation")},
        }
        return {f"graphopt.{name}": list(pair) for name, pair in names.items()}

    @classmethod
    def read(cls, notes: Mapping[str, Any]) -> Window:
        def pair(name: str) -> tuple[int, int]:
            rows, columns = notes[name]
            return int(rows), int(columns)

        return cls(*(pair(name) for name in ("size", "result", "window", "stride", "before", "dilation")))

    def extent(self, axis: int, outputs: int) -> int:
        """Input positions that `outputs` neighbouring outputs look at, from the first to the last."""
        return (outputs - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1

    @property
    def padded(self) -> bool:
        """Whether some output looks beyond the input."""
        return any(
            self.before[axis] or self.extent(axis, self.result[axis]) - self.before[axis] > self.size[axis]
            for axis in (0, 1)
        )
