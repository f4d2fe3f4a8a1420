"""Least squares in the place of training: what is left of a layer's inputs stands in for what they were.

The original and the cut model run side by side over calibration data. Where a layer reads x in the original and x' in
the cut one, x is predicted as A x' + b, and its weight W becomes W A and its bias grows by W b, so that it makes what
it made before as nearly as it can; a convolution's taps all use the channels' A. Layers further down see the outputs
of those that were refitted before (asymmetric reconstruction: He et al., Channel Pruning, ICCV 2017, section 3.2).

A is a ridge regression towards "x' is x where it stays": with few data it moves little. How much is decided for each
layer by what it gains on the half of the data that it was not fitted to, both ways round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis.labels import Slot
from graphopt.analysis.removal import Removal
from graphopt.analysis.walk import Walk
from graphopt.model import Model
from graphopt.ops import Contracted, argument, lookup
from graphopt.passes._importance import reads
from graphopt.rewriter import Node

__all__ = ["refit"]

_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried, in units of the mean variance of the inputs; and no change at all."""
_WIDEST = 8192
"""Inputs of a layer, beyond which its regression would take minutes."""


@dataclass(frozen=True)
class _Reader:
    """A layer whose inputs are not what they were.

    Attributes:
        kept: of the inputs along `axis` of `source`.
    """

    slot: Slot
    source: Node
    axis: int
    kept: Tensor
    bias: Node | None

    @property
    def weight(self) -> str:
        return str(self.slot.tensor.target)


def refit(removal: Removal, small: Model, batches: Sequence[Sequence[Tensor]]) -> list[str]:
    """Refit the layers of a cut model, in place; returns the names of the tensors that changed.

    Layers in groups, and weights that are shared, are left as they are.

    Args:
        removal: what was removed, from a model in evaluation mode.
        small: the same model after the cut, in evaluation mode.
        batches: flat tensor inputs.
    """
    original = removal.coupling.model
    named = {node.name: node for node in small.graph.nodes}
    stored = {str(node.target): node for node in small.graph.nodes if node.op == "get_attr"}
    before, after = Walk(original, batches), Walk(small, batches)
    changed: list[str] = []
    for reader in _readers(removal):
        user = named[reader.slot.user.name]
        before.before(reader.slot.user)
        after.before(user)
        source = reads(user)
        assert source is not None
        moments = _moments(reader, before.values(reader.source), after.values(source[0]))
        for name, tensor in _solved(removal, small, reader, moments).items() if moments else ():
            small.params.set(name, tensor)
            after.replace(stored[name], tensor)
            changed.append(name)
    return changed


def _readers(removal: Removal) -> Iterator[_Reader]:
    """In the order of the graph."""
    model = removal.coupling.model
    slots = {slot.user: slot for slot in removal.coupling.trace.slots if slot.role == "in" and slot.labels.dim() == 1}
    for node in model.graph.nodes:
        source = reads(node)
        slot = slots.get(node)
        if slot is None or source is None or slot.labels.numel() > _WIDEST:
            continue
        if slot.labels.numel() != source[0].meta["val"].shape[source[1]]:
            continue  # one group of several
        if len(slot.tensor.users) > 1 or len(model.params.aliases(str(slot.tensor.target))) > 1:
            continue
        kept = removal.kept(slot.labels, node)[0]
        yield _Reader(slot, *source, torch.arange(slot.labels.numel()) if kept is None else kept, _bias(model, node))


def _bias(model: Model, user: Node) -> Node | None:
    info = lookup(user.target)
    bias = argument(user, info.axes.bias, None) if info is not None and isinstance(info.axes, Contracted) else None
    own = isinstance(bias, Node) and bias.op == "get_attr" and len(bias.users) == 1
    return bias if own and len(model.params.aliases(str(bias.target))) == 1 else None  # type: ignore[union-attr]  # own


@dataclass
class _Moments:
    """Sums over rows, of inputs as they were x [in] and as they are y = (x', 1) [kept + 1]."""

    rows: float
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.rows + other.rows, self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)


def _moments(reader: _Reader, before: list[Tensor], after: list[Tensor]) -> tuple[_Moments, _Moments] | None:
    """Those of two halves of the data; None where the inputs are what they were."""
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return None
    halves: list[_Moments | None] = [None, None]
    for a, b in zip(before, after, strict=True):
        x, y = (value.movedim(reader.axis, -1).flatten(0, -2).float() for value in (a, b))
        y = torch.cat((y, y.new_ones(len(y), 1)), 1)
        middle = len(x) // 2
        for index, part in enumerate((slice(None, middle), slice(middle, None))):
            one, other = x[part], y[part]
            sums = [(u.T @ v).double().cpu() for u, v in ((one, one), (one, other), (other, other))]
            found = _Moments(float(len(one)), *sums)
            known = halves[index]
            halves[index] = found if known is None else known + found
    assert halves[0] is not None and halves[1] is not None
    return halves[0], halves[1]


def _solved(removal: Removal, small: Model, reader: _Reader, halves: tuple[_Moments, _Moments]) -> dict[str, Tensor]:
    """The new weight, and bias, of the cut layer."""
    weight = _full(removal, reader).movedim(reader.slot.axis, -1)  # [..., in]
    gram = weight.flatten(0, -2)
    gram = gram.T @ gram
    fits = [_Fit(half, reader) for half in halves]
    tried = [sum(_error(fits[i].at(ridge), halves[1 - i], gram) for i in (0, 1)) for ridge in (None, *_RIDGES)]
    best = (None, *_RIDGES)[tried.index(min(tried))]
    nothing = sum(_error(fits[0].nothing(), half, gram) for half in halves)
    if min(tried) >= nothing:
        return {}
    predicted = _Fit(halves[0] + halves[1], reader).at(best)
    fitted = (weight @ predicted[:, :-1]).movedim(-1, reader.slot.axis)
    found = {reader.weight: fitted.to(small.params[reader.weight])}
    if reader.bias is not None:
        name = str(reader.bias.target)
        info = lookup(reader.slot.user.target)
        assert info is not None and isinstance(info.axes, Contracted)
        grown = (weight @ predicted[:, -1]).movedim(info.axes.weight_out if reader.slot.axis else 0, 0)
        bias = small.params[name].detach()
        found[name] = (bias.cpu().double() + grown.reshape(len(bias), -1).sum(1)).to(bias)
    return found


def _full(removal: Removal, reader: _Reader) -> Tensor:
    """The weight with all its inputs, as it was, and of its outputs those that are left."""
    weight = removal.coupling.model.params[reader.weight].detach().cpu().double()
    for slot in removal.coupling.trace.slots:
        if slot.tensor is reader.slot.tensor and slot.axis != reader.slot.axis:
            kept = removal.kept(slot.labels, slot.user)[-1]
            weight = weight if kept is None else weight.index_select(slot.axis, kept)
    return weight


class _Fit:
    """Predictions of x from y, [in, kept + 1], fitted to some rows."""

    def __init__(self, moments: _Moments, reader: _Reader) -> None:
        self.stays = torch.zeros(len(moments.xx), len(reader.kept), dtype=torch.float64)
        self.stays[reader.kept, torch.arange(len(reader.kept))] = 1.0
        xy, yy = moments.xy / moments.rows, moments.yy / moments.rows
        # A layer without a bias predicts without a constant: its means count as variance.
        self.means = (xy[:, -1], yy[:-1, -1]) if reader.bias is not None else None
        cross, inner = xy[:, :-1], yy[:-1, :-1]
        if self.means is not None:
            cross, inner = cross - torch.outer(*self.means), inner - torch.outer(self.means[1], self.means[1])
        self.values, self.vectors = torch.linalg.eigh(inner)
        self.rest = (cross - self.stays @ inner) @ self.vectors

    def nothing(self) -> Tensor:
        """What stays is taken for what it was, and what is gone for zero."""
        return torch.cat((self.stays, torch.zeros(len(self.stays), 1, dtype=torch.float64)), 1)

    def at(self, ridge: float | None) -> Tensor:
        """With this ridge; with None only the means move."""
        slopes = self.stays
        if ridge is not None:
            damped = self.values.clamp(min=0) + ridge * self.values.clamp(min=0).mean() + 1e-30
            slopes = slopes + (self.rest / damped) @ self.vectors.T
        shift = torch.zeros(len(slopes), dtype=torch.float64)
        if self.means is not None:
            shift = self.means[0] - slopes @ self.means[1]
        return torch.cat((slopes, shift[:, None]), 1)


def _error(predicted: Tensor, moments: _Moments, gram: Tensor) -> float:
    """Sum over rows of the squares of W (x - P y), with gram = W^T W."""
    spread = moments.xx - 2 * moments.xy @ predicted.T + predicted @ moments.yy @ predicted.T
    return float((gram * spread).sum())
