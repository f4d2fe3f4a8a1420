"""The last factor of a layer, fitted to what the original layer makes, on the inputs that it gets now.

What a layer reads has changed by the factorisations before it. With z what its last factor reads now and y what the
original makes of the original inputs, the factor A and the bias b move to the ridge regression of y on z, towards what
they were. How strong the ridge is, is decided by what it gains on the half of the samples that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from graphopt.analysis.observe import observe
from graphopt.model import Model
from graphopt.passes._covariance import rows_of
from graphopt.passes._factor_layers import Whole, read_whole
from graphopt.passes._output_error import OutputError
from graphopt.rewriter import Node, Rewriter

__all__ = ["refit_last"]

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""In units of the mean square of a number that is read."""
_WIDEST = 4096
"""Numbers that one output reads, beyond which nothing is fitted."""

Batches = Sequence[Sequence[Tensor]]


def refit_last(rw: Rewriter, original: Model, calib: Batches, made: Mapping[Node, Node]) -> None:
    """Fit factors in the order of the layers, and keep that if the outputs are nearer.

    Args:
        made: for calls of `original`, in order, the last call of the factors in `rw`. Neighbours that read one value
            are fitted together.
    """
    trial = Rewriter(rw.model.clone(share_tensors=True))
    named = {node.name: node for node in trial.graph.nodes}
    changed: dict[str, Tensor] = {}
    for _, group in groupby(made.items(), key=lambda pair: pair[0].args[0]):
        lasts = {node: read_whole(trial, named[last.name]) for node, last in group}
        fits = [_Fit(trial, node, last) for node, last in lasts.items() if isinstance(last, Whole) and _may_fit(last)]
        _look(trial.model, original, calib, fits)
        for tensor, value in (pair for fit in fits for pair in fit.found()):
            trial.set_tensor(tensor, value, "fitted")
            changed[str(tensor.target)] = value
    trial.model.touch()
    outputs = OutputError(original, calib)
    apart, fitted = outputs.of(rw.model), outputs.of(trial.model)
    rw.findings["output error"] = {"factorised": apart, "refitted": fitted}
    for node in [n for n in rw.graph.nodes if n.op == "get_attr" and str(n.target) in changed and fitted < apart]:
        rw.set_tensor(node, changed[str(node.target)], "fitted to what the original layer makes")


def _may_fit(last: Whole) -> bool:
    return not last.embedding and last.columns <= _WIDEST


def _look(model: Model, original: Model, calib: Batches, fits: Sequence[_Fit]) -> None:
    """Show what layers read and should make, batch by batch."""
    for batch in calib if fits else ():
        seen: dict[Node, Tensor] = {}
        observe(original, [batch], {fit.node: partial(seen.__setitem__, fit.node) for fit in fits})
        observe(model, [batch], {fit.last.source: partial(seen.__setitem__, fit.last.source) for fit in fits})
        for fit in fits:
            fit.add(seen[fit.last.source], seen[fit.node])


class _Fit:
    """The last factor of one layer."""

    def __init__(self, trial: Rewriter, node: Node, last: Whole) -> None:
        self.trial, self.node, self.last = trial, node, last
        shared = last.bias is not None and trial.why_shared(last.bias, last.node) is not None
        self.bias = None if shared else last.bias
        self.fixed = trial.tensor(last.bias) if shared else None
        self.halves = [_Sums(last, offset=self.bias is not None) for _ in range(2)]

    def add(self, z: Tensor, y: Tensor) -> None:
        """Take in what the factor reads, and what the layer makes of what the original reads."""
        y = y if self.fixed is None else y - self.fixed.reshape(-1, *[1] * self.last.kernel.axes)
        for half, (rows, wanted) in _rows(self.last, z, y):
            self.halves[half].add(rows, wanted)

    def found(self) -> Iterator[tuple[Node, Tensor]]:
        """Its tensors with their new values."""
        whole, weight = self.last, self.trial.tensor(self.last.weight)
        assert weight is not None
        start = whole.dense(self.trial).reshape(whole.groups, -1, whole.columns)
        old = self.trial.tensor(self.bias)
        if old is not None:
            start = torch.cat((start, old.double().reshape(whole.groups, -1, 1)), 2)
        best = _with_best_ridge(self.halves, start)
        yield whole.weight, whole.stored(best[..., : whole.columns].reshape(whole.kernel.weight.shape)).to(weight)
        if self.bias is not None and old is not None:
            yield self.bias, best[..., -1].reshape(-1).to(old)


def _rows(whole: Whole, z: Tensor, y: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Which half of the samples they are of, and what the factor reads [groups, rows, n] and should make [groups, rows,
    out / groups] there."""
    wanted = (y.movedim(1, -1) if whole.kernel.axes else y).flatten(0, -2).double().cpu()
    start = 0
    for rows in rows_of(whole.kernel, z):
        end = start + rows.shape[1]
        part = wanted[start:end].reshape(end - start, whole.groups, -1).transpose(0, 1)
        middle = min(max((len(wanted) + 1) // 2 - start, 0), end - start)
        yield 0, (rows[:, :middle], part[:, :middle])
        yield 1, (rows[:, middle:], part[:, middle:])
        start = end


class _Sums:
    """Sums over rows z [groups, rows, n], with a one behind them where there is a bias, and what they should make."""

    def __init__(self, whole: Whole, *, offset: bool) -> None:
        size, outputs = whole.columns + offset, whole.kernel.outputs // whole.groups
        self.offset, self.count = offset, 0
        self.zz = torch.zeros(whole.groups, size, size, dtype=torch.float64)
        self.yz = torch.zeros(whole.groups, outputs, size, dtype=torch.float64)

    def add(self, z: Tensor, y: Tensor) -> None:
        if self.offset:
            z = torch.cat((z, z.new_ones(*z.shape[:2], 1)), 2)
        self.zz += z.transpose(1, 2) @ z
        self.yz += y.transpose(1, 2) @ z
        self.count += z.shape[1]

    def moved(self, start: Tensor, ridge: float) -> Tensor:
        """The minimum of the error plus the ridge times the square of the change. A constant is not held back."""
        unit = self.zz.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-200)
        held = torch.full((self.zz.shape[-1],), ridge, dtype=torch.float64)
        if self.offset:
            held[-1] = min(_RIDGES)
        left = self.zz + unit[:, None, None] * torch.diag(held)
        change: Tensor = torch.linalg.solve(left, (self.yz - start @ self.zz).transpose(1, 2))
        return start + change.transpose(1, 2)

    def error(self, found: Tensor) -> float:
        """The sum of squares that is left, but for a constant."""
        return float(((found @ self.zz) * found).sum() - 2 * (found * self.yz).sum())


def _with_best_ridge(halves: Sequence[_Sums], start: Tensor) -> Tensor:
    first, second = halves
    tried = {ridge: second.error(first.moved(start, ridge)) for ridge in _RIDGES} if second.count else {}
    ridge = min(tried, key=lambda one: tried[one]) if tried else max(_RIDGES)
    first.zz += second.zz
    first.yz += second.yz
    return first.moved(start, ridge)
