"""What measuring on a machine may settle for a kernel, in place of the rules that foresee it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm_ffi

from graphopt.backends.tvm.kernels.geometry import Window

__all__ = ["KERNELS", "RULES_CHOOSE", "UNTUNED", "Choices", "Tuned", "linear_problem", "task_key", "window_problem"]

KERNELS = 3
"""Version of the kernels. To be raised whenever measured choices of an older one may be wrong for a newer one."""


@dataclass(frozen=True)
class Choices:
    """Parameters of one kernel; None leaves a choice to the rule.

    Attributes:
        tile: rows and vectors of a register tile, at most.
        steps: of the reduction, written one after the other, at most.
        fetch: whether to fetch weights ahead.
        division: how the work is shared among tasks, as the kernel understands it. product and strassen: blocks of
            rows, groups of columns, chunks of the depth; convolution: rows of a task, groups of channels; winograd:
            squares of a task, groups of channels; expanded: rows of a task, vectors of channels; matmul: rows of a
            task; depthwise: rows of a task, pixels of a tile; attention: vectors of queries of a task.
    """

    tile: tuple[int, int] | None = None
    steps: int | None = None
    fetch: bool | None = None
    division: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """What is chosen, without what is left to the rules."""
        facts = {"tile": self.tile, "steps": self.steps, "fetch": self.fetch, "division": self.division}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items() if v is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choices:
        """Inverse of `to_json`.

        Raises:
            TypeError, ValueError: for anything else.
        """
        found: dict[str, Any] = {name: value for name, value in data.items() if name in ("steps", "fetch")}
        if "tile" in data:
            tall, wide = data["tile"]
            found["tile"] = (int(tall), int(wide))
        if "division" in data:
            found["division"] = tuple(int(part) for part in data["division"])
        return cls(**found)

    def __str__(self) -> str:
        parts = [f"{name} {'x'.join(map(str, v)) if isinstance(v, list) else v}" for name, v in self.to_json().items()]
        return ", ".join(parts) or "as the rules choose"


RULES_CHOOSE = Choices()


@dataclass(frozen=True)
class Tuned:
    """Measured choices for the kernels of a build.

    Attributes:
        algorithms: by problem: `plain` or `strassen` for a product, `direct`, `squares of 2` or `squares of 4` for a
            convolution.
        kernels: by the key of the function.
    """

    algorithms: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, Choices] = field(default_factory=dict)

    def choices(self, function: Any) -> Choices:
        """What is known for a fused function."""
        return self.kernels.get(task_key(function), RULES_CHOOSE) if self.kernels else RULES_CHOOSE


UNTUNED = Tuned()


def task_key(function: Any) -> str:
    """The structure of a function as the compiler fused it: its sizes, types and operators, but no names."""
    return f"{tvm_ffi.structural_hash(function.without_attr('global_symbol')) % (1 << 64):016x}"


def linear_problem(rows: int, depth: int, columns: int) -> str:
    """A product with a constant matrix; `rows` are those of an image where their number is free."""
    return f"product {rows}x{depth}x{columns}"


def window_problem(window: Window, inputs: int, outputs: int) -> str:
    """A convolution that is not grouped."""

    def pair(sizes: Sequence[int]) -> str:
        return "x".join(map(str, sizes))

    return (
        f"convolution {pair(window.kernel)} of {pair(window.size)}x{inputs} to {pair(window.result)}x{outputs}"
        f" step {pair(window.stride)} from {pair(window.before)} spread {pair(window.dilation)}"
    )
