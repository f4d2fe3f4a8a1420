"""What a random net may consist of: each step is a frozen dataclass that makes the module it stands for.

A step names its inputs by position in the list of values so far: 0 is the net's input, and every step appends
its outputs. Axis 0 is the batch and is never moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}


class Function(nn.Module):
    """A module without parameters that calls `function`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values)


class PerChannel(nn.Module):
    """Multiply by, or add, one parameter per channel (axis 1)."""

    def __init__(self, shape: Shape, multiplies: bool) -> None:
        super().__init__()
        self.multiplies = multiplies
        self.value = nn.Parameter(torch.full((shape[1], *(1 for _ in shape[2:])), float(multiplies)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value if self.multiplies else x + self.value


@dataclass(frozen=True, repr=False)
class Step:
    """One operation on value number `x`."""

    x: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.x,)

    def module(self, shape: Shape) -> nn.Module:
        """The operation for an input (the first, if there are several) of this shape."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """The call that makes this step, without arguments that have their default."""
        given = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


@dataclass(frozen=True, repr=False)
class Activation(Step):
    kind: str = "relu"

    def module(self, shape: Shape) -> nn.Module:
        return ACTIVATIONS[self.kind]()


@dataclass(frozen=True, repr=False)
class PReLU(Step):
    def module(self, shape: Shape) -> nn.Module:
        return nn.PReLU(shape[1])


@dataclass(frozen=True, repr=False)
class Softmax(Step):
    axis: int = 1

    def module(self, shape: Shape) -> nn.Module:
        return nn.Softmax(self.axis)


@dataclass(frozen=True, repr=False)
class Dropout(Step):
    def module(self, shape: Shape) -> nn.Module:
        return nn.Dropout(0.5)


@dataclass(frozen=True, repr=False)
class Linear(Step):
    out: int
    bias: bool = True

    def module(self, shape: Shape) -> nn.Module:
        return nn.Linear(shape[-1], self.out, self.bias)


@dataclass(frozen=True, repr=False)
class Conv(Step):
    """One- or two-dimensional, by the rank of its input."""

    out: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    transposed: bool = False

    def module(self, shape: Shape) -> nn.Module:
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Conv)[3:-1]}
        if self.transposed:
            kind = nn.ConvTranspose1d if len(shape) == 3 else nn.ConvTranspose2d
        else:
            kind = nn.Conv1d if len(shape) == 3 else nn.Conv2d
        return kind(shape[1], self.out, self.kernel, **options)


@dataclass(frozen=True, repr=False)
class BatchNorm(Step):
    affine: bool = True

    def module(self, shape: Shape) -> nn.Module:
        kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
        return kind(shape[1], affine=self.affine)


@dataclass(frozen=True, repr=False)
class LayerNorm(Step):
    affine: bool = True

    def module(self, shape: Shape) -> nn.Module:
        return nn.LayerNorm(shape[-1], elementwise_affine=self.affine)


@dataclass(frozen=True, repr=False)
class GroupNorm(Step):
    groups: int = 1

    def module(self, shape: Shape) -> nn.Module:
        return nn.GroupNorm(self.groups, shape[1])


@dataclass(frozen=True, repr=False)
class Pool(Step):
    kind: str = "max"
    kernel: int = 2
    stride: int = 2
    padding: int = 0

    def module(self, shape: Shape) -> nn.Module:
        kind = nn.MaxPool2d if self.kind == "max" else nn.AvgPool2d
        return kind(self.kernel, self.stride, self.padding)


@dataclass(frozen=True, repr=False)
class GlobalPool(Step):
    def module(self, shape: Shape) -> nn.Module:
        return nn.AdaptiveAvgPool2d(1)


@dataclass(frozen=True, repr=False)
class Mean(Step):
    axis: int = 1
    keep: bool = False

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.mean(self.axis, keepdim=self.keep))


@dataclass(frozen=True, repr=False)
class Pad(Step):
    """Constant padding of the last axis."""

    before: int = 0
    after: int = 1
    value: float = 0.0

    def module(self, shape: Shape) -> nn.Module:
        return nn.ConstantPad1d((self.before, self.after), self.value)


@dataclass(frozen=True, repr=False)
class Scale(Step):
    by: float = 0.5

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x * self.by)


@dataclass(frozen=True, repr=False)
class Shift(Step):
    by: float = 0.5

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x + self.by)


@dataclass(frozen=True, repr=False)
class Ramp(Step):
    """Add a constant that is computed in the net: 0, 1, 2, ... along the last axis, times `by`."""

    by: float = 0.25

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x + torch.arange(shape[-1], dtype=x.dtype) * self.by)


@dataclass(frozen=True, repr=False)
class ChannelScale(Step):
    def module(self, shape: Shape) -> nn.Module:
        return PerChannel(shape, multiplies=True)


@dataclass(frozen=True, repr=False)
class ChannelShift(Step):
    def module(self, shape: Shape) -> nn.Module:
        return PerChannel(shape, multiplies=False)


@dataclass(frozen=True, repr=False)
class Flatten(Step):
    start: int = 1
    end: int = -1

    def module(self, shape: Shape) -> nn.Module:
        return nn.Flatten(self.start, self.end)


@dataclass(frozen=True, repr=False)
class Unflatten(Step):
    axis: int
    sizes: tuple[int, ...]

    def module(self, shape: Shape) -> nn.Module:
        return nn.Unflatten(self.axis, self.sizes)


@dataclass(frozen=True, repr=False)
class Permute(Step):
    order: tuple[int, ...]

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.permute(self.order))


@dataclass(frozen=True, repr=False)
class Squeeze(Step):
    axis: int

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.squeeze(self.axis))


@dataclass(frozen=True, repr=False)
class Unsqueeze(Step):
    axis: int

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.unsqueeze(self.axis))


@dataclass(frozen=True, repr=False)
class Flip(Step):
    axis: int

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.flip(self.axis))


@dataclass(frozen=True, repr=False)
class Roll(Step):
    axis: int
    shift: int = 1

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.roll(self.shift, self.axis))


@dataclass(frozen=True, repr=False)
class Split(Step):
    """Appends one value per entry of `sizes`."""

    axis: int
    sizes: tuple[int, ...]

    def module(self, shape: Shape) -> nn.Module:
        return Function(lambda x: x.split(list(self.sizes), self.axis))


@dataclass(frozen=True, repr=False)
class Combine(Step):
    """Element by element with another value of the same shape: "add", "sub", "mul", "maximum"."""

    y: int
    kind: str = "add"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.x, self.y)

    def module(self, shape: Shape) -> nn.Module:
        return Function(getattr(torch, self.kind))


@dataclass(frozen=True, repr=False)
class Join(Step):
    """Concatenate ("cat") or stack with another value."""

    y: int
    axis: int = 1
    kind: str = "cat"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.x, self.y)

    def module(self, shape: Shape) -> nn.Module:
        join = torch.cat if self.kind == "cat" else torch.stack
        return Function(lambda x, y: join((x, y), self.axis))


@dataclass(frozen=True, repr=False)
class Again(Step):
    """The module of step number `of` once more, with the same weights."""

    of: int
