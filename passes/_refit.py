"""Least squares in the place of training: what is left of a layer's inputs stands in for what was removed.

A reader has W [out, in] and loses the inputs R. Over calibration data, x_R is nearest to A x_K + b with
A = C_RK C_KK^+ from the second moments C of the inputs (a constant 1 among x_K gives b, where the layer has a bias).
Then W_K + W_R A and bias + W_R b lose least of the layer's output (as in Luo et al., ThiNet, and He et al., Channel
Pruning, both 2017). A convolution's taps all use the channels' A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis.labels import Slot
from graphopt.analysis.observe import observe
from graphopt.analysis.removal import Removal
from graphopt.model import Model
from graphopt.ops import Contracted, argument, lookup
from graphopt.passes._importance import read_by
from graphopt.rewriter import Node

__all__ = ["refitted"]

_CUTOFF = 1e-5
"""Directions in which the inputs vary less than this part of the most are left alone: no ill-conditioned inverse."""


@dataclass(frozen=True)
class _Reader:
    """A layer that loses inputs."""

    slot: Slot
    source: Node
    axis: int
    kept: Tensor
    bias: Node | None


def refitted(removal: Removal, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """New values, before the cut, of the weights and biases of all layers that lose inputs, by name. Values along
    positions that go mean nothing. Layers in groups, and weights that are shared, are left out."""
    model = removal.coupling.model
    readers = list(_readers(removal))
    moments: dict[tuple[Node, int], Tensor] = {}
    watch: dict[Node, list[int]] = {}
    for reader in readers:
        if reader.axis not in watch.setdefault(reader.source, []):
            watch[reader.source].append(reader.axis)
    observe(model, batches, {source: _adder(moments, source, axes) for source, axes in watch.items()})
    found: dict[str, Tensor] = {}
    for reader in readers:
        found |= _solved(model, reader, moments[reader.source, reader.axis])
    return found


def _readers(removal: Removal) -> Iterator[_Reader]:
    model = removal.coupling.model
    for slot in removal.coupling.trace.slots:
        if slot.role != "in" or slot.labels.dim() != 1:
            continue
        kept = removal.kept(slot.labels, slot.user)[0]
        source = read_by(slot)
        name = str(slot.tensor.target)
        if kept is None or source is None or len(slot.tensor.users) > 1 or len(model.params.aliases(name)) > 1:
            continue
        yield _Reader(slot, source[0], source[1], kept, _bias(model, slot.user))


def _bias(model: Model, user: Node) -> Node | None:
    info = lookup(user.target)
    bias = argument(user, info.axes.bias, None) if info is not None and isinstance(info.axes, Contracted) else None
    own = isinstance(bias, Node) and bias.op == "get_attr" and len(bias.users) == 1
    return bias if own and len(model.params.aliases(str(bias.target))) == 1 else None  # type: ignore[union-attr]  # own


def _adder(moments: dict[tuple[Node, int], Tensor], source: Node, axes: list[int]) -> Callable[[Tensor], None]:
    def add(value: Tensor) -> None:
        for axis in axes:
            rows = value.movedim(axis, -1).reshape(-1, value.shape[axis]).float()
            rows = torch.cat((rows, torch.ones(len(rows), 1)), 1)
            sums = rows.T @ rows
            moments[source, axis] = moments[source, axis] + sums if (source, axis) in moments else sums

    return add


def _solved(model: Model, reader: _Reader, moment: Tensor) -> dict[str, Tensor]:
    size = len(moment) - 1
    gone = torch.ones(size, dtype=torch.bool)
    gone[reader.kept] = False
    lost = gone.nonzero().flatten()
    known = reader.kept if reader.bias is None else torch.cat((reader.kept, torch.tensor([size])))
    wide = moment.double()
    stand_in = wide[lost][:, known] @ _pseudo_inverse(wide[known][:, known])  # [lost, known]
    name = str(reader.slot.tensor.target)
    weight = model.params[name].detach()
    columns = weight.double().movedim(reader.slot.axis, -1)  # [..., in]
    new = columns.clone()
    new[..., reader.kept] += columns[..., lost] @ stand_in[:, : len(reader.kept)]
    found = {name: new.movedim(-1, reader.slot.axis).to(weight.dtype)}
    if reader.bias is not None:
        bias = model.params[str(reader.bias.target)].detach()
        info = lookup(reader.slot.user.target)
        assert info is not None and isinstance(info.axes, Contracted)
        by_output = (columns[..., lost] @ stand_in[:, -1]).movedim(info.axes.weight_out if reader.slot.axis else 0, 0)
        found[str(reader.bias.target)] = (bias.double() + by_output.reshape(len(bias), -1).sum(1)).to(bias.dtype)
    return found


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _CUTOFF * values[-1].clamp(min=1e-30)
    inverse: Tensor = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return inverse
