"""Padding, and cutting where the amounts are negative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import tirx

from graphopt.backends.tvm.layout import Padded, computed, ordered
from graphopt.backends.tvm.operators.movement import shifted
from graphopt.backends.tvm.registry import Call, Refused, converts

aten = torch.ops.aten


@converts(aten.constant_pad_nd.default, layout="any")
def constant_pad(call: Call, self: Any, pad: Sequence[Any], value: Any = 0) -> Any:
    """Pad (or, with negative numbers, cut) the last axes first."""
    sizes, dtype = ordered(self).shape, call.dtype
    before = [0] * len(sizes)
    for position in range(len(pad) // 2):
        before[len(sizes) - 1 - position] = pad[2 * position]

    def element(read: Callable[..., Any]) -> Callable[..., Any]:
        def value_at(*at: Any) -> Any:
            source = [i - low for i, low in zip(at, before, strict=True)]
            inside = [check for i, size in zip(source, sizes, strict=True) for check in (i >= 0, i < size)]
            return tirx.if_then_else(tirx.all(*inside), read(*source), tirx.const(value, dtype))

        return value_at

    result = computed(call, self, call.shape, element, "pad")
    if len(sizes) != 4 or len(pad) > 4 or value != 0 or not all(isinstance(n, int) and n >= 0 for n in pad):
        return result
    known = ordered(result)
    return Padded(known.value, known.order, ordered(self), (before[2], before[3]))


@converts(aten.pad.default, layout="any")
def pad_mode(call: Call, self: Any, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant":
        return constant_pad(call, self, pad, 0 if value is None else value)
    sources = {"reflect": _reflect, "replicate": _replicate, "circular": tirx.floormod}
    if mode not in sources:
        raise Refused(f"padding mode {mode}")
    return _edge_pad(call, self, pad, sources[mode])


@converts(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default, layout="any")
def reflection_pad(call: Call, self: Any, padding: Sequence[Any]) -> Any:
    return _edge_pad(call, self, padding, _reflect)


@converts(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default, layout="any")
def replication_pad(call: Call, self: Any, padding: Sequence[Any]) -> Any:
    return _edge_pad(call, self, padding, _replicate)


def _reflect(index: Any, size: Any) -> Any:
    """Mirror at the first and the last element, which are not repeated; pads are smaller than the size."""
    low = tirx.Select(index < 0, 0 - index, index)
    return tirx.Select(low >= size, 2 * size - 2 - low, low)


def _replicate(index: Any, size: Any) -> Any:
    return tirx.max(tirx.min(index, size - 1), 0)


def _edge_pad(call: Call, x: Any, pad: Sequence[Any], place: Callable[[Any, Any], Any]) -> Any:
    sizes = ordered(x).shape
    before = [0] * len(sizes)
    padded = set()
    for position in range(len(pad) // 2):
        axis = len(sizes) - 1 - position
        before[axis] = pad[2 * position]
        padded.add(axis)
    return shifted(
        call,
        x,
        lambda i: [place(at - before[a], sizes[a]) if a in padded else at for a, at in enumerate(i)],
        "edge_pad",
    )
