"""Per-channel affine maps `y = scale * x + shift`, and how a layer next to one takes it into its weight and bias.

After a layer:   W[o] *= scale[o]      b = scale * b + shift
Before a layer:  W[:, i] *= scale[i]   b += sum over i and taps of W[:, i] * shift[i]

The second is exact where the layer reads no zeros from a padding: `scale * 0 + shift` is not zero. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphopt.ops import argument
from graphopt.params import ParamKind
from graphopt.passes._layers import Layer, read_layer, scaled, summed
from graphopt.rewriter import Node, Rewriter

__all__ = ["Affine", "absorb"]

aten = torch.ops.aten

_LONGEST_CHAIN = 8


@dataclass(frozen=True)
class Affine:
    """The call `node` computes `scale * source + shift` along `axis`.

    Both are float64 [C], or [1] with `axis` None when all channels are treated alike. `trainable` says whether a tensor
    in them was.
    """

    node: Node
    source: Node
    axis: int | None
    scale: torch.Tensor
    shift: torch.Tensor
    trainable: bool = False


@dataclass(frozen=True)
class _Change:
    """What a layer has to become: the tensors that change, and the zeros to pad explicitly and with which value."""

    layer: Layer
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    pads: tuple[int, ...] = ()
    fill: float = 0.0


def absorb(rw: Rewriter, nodes: Iterable[Node], read: Callable[[Rewriter, Node], Affine | str | None]) -> None:
    """Take every affine map among `nodes` into the layer before it, else into all the layers after it.

    `read` gives the map, a reason why a candidate is none, or None for what is no candidate. Layers after a map are
    tried last node first, so that a chain of maps in front of a layer goes in one sweep.
    """
    left: dict[Node, str] = {}
    for node in nodes:
        affine = read(rw, node)
        if isinstance(affine, str):
            rw.skip(node, affine)
        elif affine is not None and (reason := _absorb_after(rw, affine)):
            left[node] = reason
    maps: dict[Node, Affine] = {}
    for node, reason in left.items():
        affine = read(rw, node)  # again: its source may have gone into a layer by now
        if isinstance(affine, Affine):
            maps[node] = affine
        else:
            rw.skip(node, affine or reason)
    for node in reversed(list(maps)):
        if rw.exhausted:
            return
        if node in maps:
            _absorb_chain(rw, maps, node, left)
    for node in maps:
        rw.skip(node, left[node])


def _absorb_chain(rw: Rewriter, maps: dict[Node, Affine], node: Node, reasons: dict[Node, str]) -> None:
    """Take the map at `node`, with as many as possible of those right before it, into the layers after it.

    Together they may do what one by one they cannot: `2 * x - 1` is zero where x is padded with 0.5.
    """
    layers = [read_layer(rw, user) for user in node.users]
    beyond = [found for found in layers if isinstance(found, str)]
    if beyond:
        reasons[node] += f"; {beyond[0]}"
        return
    chain, composed = [node], [maps[node]]
    while len(chain) < _LONGEST_CHAIN and (before := maps.get(composed[-1].source)) is not None:
        joined = _compose(before, composed[-1]) if len(before.node.users) == 1 else None
        if joined is None:
            break
        chain.append(before.node)
        composed.append(joined)
    why: str | None = None
    for count in range(len(chain), 0, -1):
        why = _absorb_before(rw, composed[count - 1])
        if why is None:
            for done in chain[:count]:
                del maps[done]
            return
    reasons[node] += f"; {why}"


def _compose(first: Affine, second: Affine) -> Affine | None:
    """`second` after `first` as one map; None where they act on different axes."""
    if None not in (first.axis, second.axis) and first.axis != second.axis:
        return None
    return Affine(
        second.node,
        first.source,
        first.axis if second.axis is None else second.axis,
        second.scale * first.scale,
        second.scale * first.shift + second.shift,
        first.trainable or second.trainable,
    )


def _absorb_after(rw: Rewriter, affine: Affine) -> str | None:
    found = _layer_before(rw, affine)
    if isinstance(found, str):
        return found
    layer, axis = found
    if axis is not None and axis != layer.output_axis:
        return f"it acts on axis {axis}, the channels of '{layer.call.name}' are axis {layer.output_axis}"
    change = _after(rw, layer, affine)
    why = _why_not(rw, change, affine)
    if why is not None:
        return why
    _apply(rw, change, affine, f"'{affine.node.name}' is folded into it")
    rw.replace(affine.node, affine.source, f"folded into '{layer.call.name}'")
    return None


def _layer_before(rw: Rewriter, affine: Affine) -> tuple[Layer, int | None] | str:
    """The layer that makes the source, seen through transpositions, and the affine map's axis on its output."""
    node, user, axis = affine.source, affine.node, affine.axis
    while True:
        others = [other.name for other in node.users if other is not user]
        if others:
            return f"'{node.name}' is also used by '{others[0]}'"
        order = _order(rw, node)
        if order is None:
            break
        axis = None if axis is None else order[axis]
        node, user = argument(node, "self"), node
    layer = read_layer(rw, node)
    return layer if isinstance(layer, str) else (layer, axis)


def _order(rw: Rewriter, node: Node) -> list[int] | None:
    """Which axis of its input each axis of a transposition is; None for any other node."""
    if node.op != "call_function" or node.target not in (aten.permute.default, aten.transpose.int):
        return None
    order = list(range(rank := rw.fake(node).dim()))
    if node.target is aten.permute.default:
        return [axis % rank for axis in argument(node, "dims")]
    a, b = argument(node, "dim0") % rank, argument(node, "dim1") % rank
    order[a], order[b] = b, a
    return order


def _after(rw: Rewriter, layer: Layer, affine: Affine) -> _Change:
    weight, bias = _values(rw, layer)
    count = layer.channels(weight.shape, layer.weight_out)
    scale, shift = affine.scale.expand(count), affine.shift.expand(count)
    rescaled = bool((scale != 1).any())
    new_weight = scaled(weight, layer.weight_out, scale, layer.groups) if rescaled else None
    new_bias = None
    if bool((shift != 0).any()) or (rescaled and layer.bias is not None):
        new_bias = shift.clone() if bias is None else bias * scale + shift
    return _Change(layer, new_weight, new_bias)


def _absorb_before(rw: Rewriter, affine: Affine) -> str | None:
    changes = []
    for user in affine.node.users:
        change = _before(rw, user, affine)
        if isinstance(change, str):
            return change
        why = _why_not(rw, change, affine)
        if why is not None:
            return why
        changes.append(change)
    for change in changes:
        _apply(rw, change, affine, f"'{affine.node.name}' is folded into it")
        source = affine.source
        if change.pads:
            args = (affine.source, list(change.pads), change.fill)
            source = rw.call(aten.constant_pad_nd.default, *args, before=change.layer.call)
        _read_from(rw, change, source, f"'{affine.node.name}' is folded into it")
    return None


def _before(rw: Rewriter, user: Node, affine: Affine) -> _Change | str:
    layer = read_layer(rw, user)
    if isinstance(layer, str):
        return layer
    if affine.axis is not None and affine.axis != layer.input_axis:
        return f"it acts on axis {affine.axis}, '{user.name}' sums over axis {layer.input_axis}"
    weight, bias = _values(rw, layer)
    count = layer.channels(weight.shape, layer.weight_in)
    scale, shift = affine.scale.expand(count), affine.shift.expand(count)
    rescaled = bool((scale != 1).any())
    new_weight = scaled(weight, layer.weight_in, scale, layer.groups) if rescaled else None
    change = _Change(layer, new_weight, None)
    if not bool((shift != 0).any()):
        return change
    padded = _padded(change, affine, scale, shift, weight.shape[2:])
    if isinstance(padded, str):
        return padded
    added = layer.alpha * summed(scaled(weight, layer.weight_in, shift, layer.groups), layer.weight_out, layer.groups)
    return replace(padded, bias=added if bias is None else bias + added)


def _padded(
    change: _Change, affine: Affine, scale: torch.Tensor, shift: torch.Tensor, kernel: torch.Size
) -> _Change | str:
    """The change for a map that shifts: nothing to pad, or a constant that the map takes to zero."""
    layer = change.layer
    name = layer.call.name
    if layer.transposed:
        if layer.is_pointwise(kernel):
            return change
        return f"'{name}' is a transposed convolution, whose outputs do not all see the shift alike"
    pads = layer.pads(kernel)
    if pads is None:
        return f"the padding of '{name}' is not a number"
    if all(pad == (0, 0) for pad in pads):
        return change
    fill = -shift / scale
    if not bool(torch.isfinite(fill).all()) or not torch.allclose(fill, fill[0], rtol=1e-12, atol=0.0):
        return f"'{name}' pads with zeros after the shift, which no one constant before it gives"
    if len(affine.node.users) > 1:
        return f"'{name}' pads with zeros after the shift, and '{affine.node.name}' has other users"
    return replace(change, pads=tuple(size for pad in reversed(pads) for size in pad), fill=float(fill[0]))


def _values(rw: Rewriter, layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias in float64; the bias is times beta, as it is added to the output."""
    weight, bias = rw.tensor(layer.weight), rw.tensor(layer.bias)
    assert weight is not None
    if bias is None or layer.beta == 0:
        return weight.double(), None
    return weight.double(), bias.double() * layer.beta


def _why_not(rw: Rewriter, change: _Change, affine: Affine) -> str | None:
    """Why the layer may not be changed so."""
    layer = change.layer
    old = rw.tensor(layer.weight)
    assert old is not None
    dtype = rw.fake(affine.node).dtype
    if old.dtype != dtype:
        return f"'{layer.call.name}' computes in {old.dtype}, '{affine.node.name}' in {dtype}"
    if change.bias is not None and layer.bias_name is None:
        return f"'{layer.call.name}' takes no bias"
    changes = ((layer.weight, layer.reader, change.weight), (layer.bias, layer.call, change.bias))
    for node, reader, new in changes:
        if new is None:
            continue
        if not bool(torch.isfinite(new.to(dtype)).all()):
            return f"the folded tensors of '{layer.call.name}' would not be finite in {dtype}"
        why = _why_fixed(rw, node, reader, new) if node is not None else None
        if why is not None:
            return why
    return None


def _why_fixed(rw: Rewriter, node: Node, user: Node, new: torch.Tensor) -> str | None:
    """Why the tensor at `node` may not become `new`."""
    mask = rw.params.masks.get(str(node.target))
    if mask is not None and (mask.shape != new.shape or bool(new[mask].any())):
        return f"the mask of '{node.target}' keeps elements zero"
    return rw.why_shared(node, user)


def _apply(rw: Rewriter, change: _Change, affine: Affine, why: str) -> None:
    """Store the new tensors in the dtype of the old ones."""
    layer = change.layer
    old = rw.tensor(layer.weight)
    assert old is not None
    if change.weight is not None:
        rw.set_tensor(layer.weight, change.weight.to(old.dtype), why)
    if change.bias is None:
        return
    arguments: dict[str, Any] = {"beta": 1} if layer.beta != 1 else {}
    if layer.bias is not None:
        rw.set_tensor(layer.bias, change.bias.to(old.dtype), why)
    else:
        assert layer.bias_name is not None
        arguments[layer.bias_name] = _new_bias(rw, layer, change.bias.to(old.dtype), affine.trainable)
    if arguments:
        rw.update(layer.call, why, **arguments)


def _new_bias(rw: Rewriter, layer: Layer, value: torch.Tensor, trainable: bool) -> Node:
    """A bias of the weight's kind, trainable where the weight is or what it is made from was."""
    name = str(layer.weight.target)
    path, _, leaf = name.rpartition(".")
    leaf = "bias" if leaf == "weight" else f"{leaf}_bias"
    kind = rw.params.kind(name)
    if kind is ParamKind.PARAMETER:
        value = torch.nn.Parameter(value, requires_grad=trainable or rw.params[name].requires_grad)
    return rw.add_tensor(f"{path}.{leaf}" if path else leaf, value, kind=kind, like=layer.weight)


def _read_from(rw: Rewriter, change: _Change, source: Node, why: str) -> None:
    """Let the layer read `source`, and pad nothing itself where that is done before it."""
    arguments: dict[str, Any] = {change.layer.input_name: source}
    if change.pads:
        by_name = isinstance(argument(change.layer.call, "padding"), str)
        arguments["padding"] = "valid" if by_name else [0] * change.layer.window
    rw.update(change.layer.call, why, **arguments)
