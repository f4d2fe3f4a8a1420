"""Moving data: reshape, transpose, slice, split, join."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.frontends.onnx.registry import Outputs, operator
from graphopt.frontends.onnx.unsigned import same_bits
from graphopt.frontends.onnx.values import Ints, Known, refuse

_PAST_THE_END = 2**31 - 1
"""Ends at least this large mean "to the end"."""


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    return x


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Known:
    sizes = list(x.shape)[start:end]
    return Known.of(sizes, (len(sizes),), torch.int64)


@operator("Size")
def size(x: Tensor) -> Known:
    return Known.of([x.numel()], (), torch.int64)


@operator("Reshape")
def reshape(x: Tensor, to: Ints, *, allowzero: int = 0) -> Tensor:
    """A zero keeps the size of that axis, unless `allowzero`."""
    kept = [x.shape[i] if isinstance(d, int) and d == 0 and not allowzero else d for i, d in enumerate(to)]
    if any(isinstance(size_, torch.SymInt) for size_ in x.shape) and _moves_units(x, kept):
        x = x.squeeze(_units(x.shape))
        for axis in _units(kept):
            x = x.unsqueeze(axis)
        return x
    return x.reshape(kept)


def _units(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i, d in enumerate(sizes) if isinstance(d, int) and d == 1)


def _moves_units(x: Tensor, to: Sequence[int]) -> bool:
    """Whether a reshape only drops and adds axes of size one; written so, it puts no condition on dynamic sizes."""
    ours = [d for d in x.shape if not (isinstance(d, int) and d == 1)]
    theirs = [d for d in to if not (isinstance(d, int) and d == 1)]
    if len(ours) != len(theirs) or sum(isinstance(d, int) and d == -1 for d in theirs) > 1:
        return False
    # Compared as text: asking whether a size equals another would be a condition of its own.
    return all(str(b) in ("-1", str(a)) for a, b in zip(ours, theirs, strict=True))


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix of the axes before `axis` and those from `axis` on."""
    axis += x.ndim if axis < 0 else 0
    if axis == 1 and x.ndim > 1:
        return torch.flatten(x, 1)
    rows = columns = 1
    for size_ in x.shape[:axis]:
        rows = rows * size_
    for size_ in x.shape[axis:]:
        columns = columns * size_
    return x.reshape(rows, columns)


@operator("Transpose")
def transpose(x: Tensor, *, perm: Ints | None = None) -> Tensor:
    return x.permute(perm if perm is not None else tuple(reversed(range(x.ndim))))


@operator("Squeeze", until=12)
def squeeze_attribute(x: Tensor, *, axes: Ints | None = None) -> Tensor:
    return squeeze(x, axes)


@operator("Squeeze", since=13)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Without axes, every axis of size one goes; a dynamic one stays. Axes that are named must have size one, which
    fixes a dynamic one; torch would keep an axis of another size.
    """
    if axes is None:
        axes = tuple(i for i, d in enumerate(x.shape) if isinstance(d, int) and d == 1)
    for axis in axes:
        if x.shape[axis] != 1:
            raise refuse(
                f"axis {axis} has size {x.shape[axis]}, only one of size one can go", "write 1 for it into the file"
            )
    return x.squeeze(axes)


@operator("Unsqueeze", until=12)
def unsqueeze_attribute(x: Tensor, *, axes: Ints) -> Tensor:
    return unsqueeze(x, axes)


@operator("Unsqueeze", since=13)
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """The axes are those of the result."""
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Expand", since=8)
def expand(x: Tensor, to: Ints) -> Tensor:
    """Broadcasting goes both ways: a one in `to` keeps the size of the input."""
    rank = max(x.ndim, len(to))
    target = (1,) * (rank - len(to)) + to
    own = (1,) * (rank - x.ndim) + tuple(x.shape)
    return x.expand([o if isinstance(t, int) and t == 1 else t for t, o in zip(target, own, strict=True)])


@operator("Tile")
def tile(x: Tensor, repeats: Ints) -> Tensor:
    return x.repeat(repeats)


@operator("Concat")
def concat(*inputs: Tensor, axis: int) -> Tensor:
    return torch.cat(inputs, axis)


@operator("Split", until=12)
def split_attribute(x: Tensor, *, outputs: Outputs, split: Ints | None = None, axis: int = 0) -> tuple[Tensor, ...]:
    return split_sizes(x, split, outputs=outputs, axis=axis)


@operator("Split", since=13)
def split_sizes(
    x: Tensor, split: Ints | None = None, *, outputs: Outputs, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    """Without sizes the parts are equal; with `num_outputs` the last may be smaller."""
    if split is not None:
        return torch.split(x, list(split), axis)
    count = num_outputs or outputs
    if num_outputs is None and x.shape[axis] % count:
        raise refuse(f"axis {axis} of size {x.shape[axis]} does not split into {count} equal parts")
    return torch.split(x, -(-x.shape[axis] // count), axis)


@operator("Slice", until=9)
def slice_attributes(x: Tensor, *, starts: Ints, ends: Ints, axes: Ints | None = None) -> Tensor:
    return slice_(x, starts, ends, axes)


@operator("Slice", since=10)
def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    axes = axes if axes is not None else tuple(range(len(starts)))
    steps = steps if steps is not None else (1,) * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _slice_axis(x, start, end, axis % x.ndim, step)
    return x


def _slice_axis(x: Tensor, start: int, end: int, axis: int, step: int) -> Tensor:
    if isinstance(step, int) and step > 0:
        last = None if isinstance(end, int) and end >= _PAST_THE_END else end
        return x[(slice(None),) * axis + (slice(start, last, step),)]
    size_ = x.shape[axis]
    if isinstance(size_, int) and all(isinstance(v, int) for v in (start, end, step)):
        picked = range(size_)[slice(start, None if end < -size_ else end, step)]
        return same_bits(lambda t: t.index_select(axis, torch.tensor(list(picked), dtype=torch.int64)), x)
    whole = isinstance(end, int) and end <= -_PAST_THE_END
    if isinstance(start, int) and (start == -1 or start >= _PAST_THE_END) and whole and step == -1:
        return x.flip(axis)
    raise refuse(f"slicing backwards from {start} to {end} by {step} along axis {axis} of dynamic size")


@operator("DepthToSpace", until=10)
def depth_to_space_old(x: Tensor, *, blocksize: int) -> Tensor:
    return depth_to_space(x, blocksize=blocksize)


@operator("DepthToSpace", since=11)
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DCR: the block offsets lead the channel axis; CRD: they follow it, which is torch's pixel shuffle."""
    if mode == "CRD":
        return torch.pixel_shuffle(x, blocksize)
    if mode != "DCR":
        raise refuse(f"attribute 'mode'='{mode}' is not handled")
    n, c, h, w = x.shape
    b = blocksize
    parts = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth", until=27)
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    return space_to_depth_modes(x, blocksize=blocksize)


@operator("SpaceToDepth", since=28)
def space_to_depth_modes(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """The inverse of `depth_to_space` in the same mode."""
    if mode == "CRD":
        return torch.pixel_unshuffle(x, blocksize)
    if mode != "DCR":
        raise refuse(f"attribute 'mode'='{mode}' is not handled")
    n, c, h, w = x.shape
    b = blocksize
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@operator("CenterCropPad", since=18)
def center_crop_pad(x: Tensor, to: Ints, *, axes: Ints | None = None) -> Tensor:
    """Each axis is cut or zero-padded about its middle to the size asked for."""
    pads = [0] * (2 * x.ndim)
    for axis, target in zip(axes if axes is not None else range(x.ndim), to, strict=True):
        axis %= x.ndim
        missing = target - x.shape[axis]
        if missing < 0:
            x = x.narrow(axis, -missing // 2, target)
        else:
            pads[2 * (x.ndim - 1 - axis) : 2 * (x.ndim - axis)] = [missing // 2, missing - missing // 2]
    return torch.nn.functional.pad(x, pads)


@operator("ReverseSequence", since=10)
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse the first `lengths[b]` steps of every sequence."""
    steps = torch.arange(x.shape[time_axis])
    lengths = lengths.to(torch.int64).unsqueeze(1)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)  # [batch, time]
    order = order if batch_axis < time_axis else order.t()
    order = order.reshape(list(order.shape) + [1] * (x.ndim - 2)).expand(x.shape)
    return x.gather(time_axis, order)
