"""What the table says about an operator: its kind, how its axes behave, and its flags."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.fx import Node

from graphopt.ops.axes import Axes
from graphopt.ops.sizes import Size

__all__ = ["Kind", "Literal", "OpInfo"]


class Kind(enum.Enum):
    """Families of operators."""

    ELEMENTWISE = "element-wise"
    MOVEMENT = "movement"
    CONTRACTION = "contraction"
    NORMALIZATION = "normalization"
    POOLING = "pooling"
    RESAMPLING = "resampling"
    REDUCTION = "reduction"
    SCAN = "scan"
    SOFTMAX = "softmax"
    ATTENTION = "attention"
    INDEXING = "indexing"
    CREATION = "creation"
    RANDOM = "random"
    RECURRENT = "recurrent"
    SORTING = "sorting"
    LOSS = "loss"
    SIZE = "size"


@dataclass(frozen=True)
class Literal:
    """A number in a call that has to agree with the size of an axis.

    `argument` is the schema name, `value` what is written there; `size` is what the axis `axis` of `operand`
    (a schema name, or `output`) asks for. `value` has to equal `size`, or with `divides` to divide it.
    """

    argument: str
    value: Size
    operand: str
    axis: int
    size: Size
    divides: bool = False

    def agrees(self) -> bool:
        """Whether the number fits; a symbolic size on either side is not judged here."""
        if not isinstance(self.value, int) or not isinstance(self.size, int):
            return True
        if self.divides:
            return self.value > 0 and self.size % self.value == 0
        return self.value == self.size


@dataclass(frozen=True)
class OpInfo:
    """One row of the table.

    Attributes:
        kind: the family.
        axes: how axes of the inputs relate to axes of the output.
        macs: multiply-accumulates of a call, from the shapes in `meta["val"]`; None: the operator has none.
        work: arithmetic operations per element of the largest tensor that the call reads or makes, apart from
            `macs`; a transcendental function counts as one.
        commutative: the first two tensor operands may be swapped, unless a scalar forbids it: ask
            `is_commutative(node)`.
        training: name of the argument that is the training flag. Ask `is_training(node)`: some calls of a
            norm without running statistics set the flag in both modes.
        probability: name of the argument that makes a call random when it is above zero (and `training` is
            set, where there is such a flag).
        stateful: a training call updates running statistics in place.
        view: may share memory with its input and then moves no bytes. Ask `is_view(node)`.
        random: draws random numbers whatever its arguments.
        literals: the numbers in a call that encode the size of an axis; None when there are none.
    """

    kind: Kind
    axes: Axes
    macs: Callable[[Node], Size] | None = None
    work: int = 0
    commutative: bool = False
    training: str | None = None
    probability: str | None = None
    stateful: bool = False
    view: bool = False
    random: bool = False
    literals: Callable[[Node], Iterable[Literal]] | None = None

    @property
    def pure(self) -> bool:
        """Every call may be removed, merged or folded; else ask `is_pure(node)`."""
        return not (self.random or self.stateful or self.probability or self.kind is Kind.RANDOM)


def rows(names: str, info: OpInfo) -> dict[str, OpInfo]:
    """The same row for every overload in a blank-separated list; `relu` means `relu.default`."""
    return {name if "." in name else f"{name}.default": info for name in names.split()}
