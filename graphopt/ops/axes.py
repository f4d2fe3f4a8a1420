"""How axes of the inputs relate to axes of the output, as plain data.

Every class names the tensor arguments it speaks about as the schema does. Negative axes count from the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from graphopt.ops.arguments import argument
from graphopt.ops.sizes import rank

__all__ = [
    "Along",
    "Axes",
    "Broadcast",
    "Contracted",
    "Created",
    "Indexed",
    "Moved",
    "Normalized",
    "Opaque",
    "Product",
    "Reduced",
    "Windowed",
]


@dataclass(frozen=True)
class Axes:
    """Base of all axis behaviours."""

    def mixed(self, node: Node) -> tuple[int, ...] | None:
        """Axes of the main operand (non-negative, ascending) along which an output element depends on more
        than its own position; along every other axis positions stay apart. None: this class cannot say it in
        these terms.
        """
        return None


@dataclass(frozen=True)
class Broadcast(Axes):
    """Output element i depends on elements i of the operands, which broadcast together.

    No `operands` means every tensor argument. The `per_channel` ones are vectors along axis 1 of the first.
    """

    operands: tuple[str, ...] = ()
    per_channel: tuple[str, ...] = ()

    def mixed(self, node: Node) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Moved(Axes):
    """Every output element is an element of `values`, or a fill value; running it on labels tells which."""

    values: tuple[str, ...] = ("self",)


@dataclass(frozen=True)
class Contracted(Axes):
    """A layer with a weight: sums products over `input_axis` of the input and makes `output_axis`.

    `weight_in` and `weight_out` are the weight's axes for the two, each counting one group of `groups` where
    the operator has them (`weight_out` counts one group of a transposed convolution, `weight_in` of any
    other). The bias is a vector along `output_axis`. The trailing `window` axes are convolved with the
    trailing axes of the weight.
    """

    input_axis: int
    output_axis: int
    weight_in: int
    weight_out: int
    window: int = 0
    groups: str | None = None
    transposed: bool = False
    input: str = "input"
    weight: str = "weight"
    bias: str = "bias"

    def mixed(self, node: Node) -> tuple[int, ...]:
        dims = rank(argument(node, self.input))
        return tuple(sorted({self.input_axis % dims, *range(dims - self.window, dims)}))


@dataclass(frozen=True)
class Product(Axes):
    """A product of tensors, described by an Einstein equation over `operands`; `equation(node)` in
    contraction.py gives it for the call. `added` is broadcast to the result and added.
    """

    operands: tuple[str, ...]
    equation: str | None = None
    added: str | None = None


@dataclass(frozen=True)
class Normalized(Axes):
    """Shifted and scaled by statistics. `over` says which axes of `input` share a statistic:

    - `trailing`: the last axes, as many as `normalized_shape` has; the parameters lie along those axes
    - `batch`: all but axis 1 while training, none otherwise; the parameters are vectors along axis 1
    - `instance`: the axes after axis 1 if `use_input_stats`, none otherwise; parameters as for `batch`
    - `group`: runs of `num_groups` along axis 1, and all axes after it; parameters as for `batch`
    """

    over: str
    parameters: tuple[str, ...]
    flag: str | None = None

    def mixed(self, node: Node) -> tuple[int, ...]:
        dims = rank(argument(node, "input"))
        if self.over == "trailing":
            return tuple(range(dims - len(argument(node, "normalized_shape")), dims))
        if self.flag and not argument(node, self.flag):
            return ()
        first = {"batch": (0, 2), "instance": (2,), "group": (1, 2)}[self.over]
        return tuple(axis for axis in (*first[:-1], *range(first[-1], dims)) if axis < dims)


@dataclass(frozen=True)
class Along(Axes):
    """Elements meet along one axis, given by the argument `dim` (or always `axis`), and along no other."""

    dim: str = "dim"
    axis: int | None = None
    operand: str = "self"

    def mixed(self, node: Node) -> tuple[int, ...]:
        dims = rank(argument(node, self.operand))
        axis = self.axis if self.axis is not None else argument(node, self.dim)
        return (axis % dims,) if dims else ()


@dataclass(frozen=True)
class Reduced(Axes):
    """Reduces the axes given by the argument `dim`, all of them where it is None or absent (`dim=None` here).

    Reduced axes vanish unless the argument `keepdim` is there and set. `empty_is_all`: an empty list means
    all axes.
    """

    dim: str | None = "dim"
    keepdim: str | None = "keepdim"
    empty_is_all: bool = True

    def mixed(self, node: Node) -> tuple[int, ...]:
        dims = rank(argument(node, "self"))
        given: Any = argument(node, self.dim) if self.dim else None
        if given is None or (self.empty_is_all and given == []):
            return tuple(range(dims))
        listed = given if isinstance(given, (list, tuple)) else [given]
        return tuple(sorted({axis % dims for axis in listed})) if dims else ()


@dataclass(frozen=True)
class Windowed(Axes):
    """Works on windows over the last `trailing` axes and on every leading position by itself."""

    trailing: int
    operand: str = "self"

    def mixed(self, node: Node) -> tuple[int, ...]:
        dims = rank(argument(node, self.operand))
        return tuple(range(dims - self.trailing, dims))


@dataclass(frozen=True)
class Indexed(Axes):
    """Reads from or writes to `table` at positions given by `indices`, along the argument `dim` where there
    is one (or always `axis`); both None: the indices say which axes. `values` are written.
    """

    table: str = "self"
    indices: str = "index"
    dim: str | None = "dim"
    axis: int | None = None
    values: str | None = None


@dataclass(frozen=True)
class Created(Axes):
    """Takes no values from any input tensor, at most its shape, dtype or device."""


@dataclass(frozen=True)
class Opaque(Axes):
    """Nothing is claimed: no axis may be changed through the call and nothing moves across it."""
