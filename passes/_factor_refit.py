"""Factors fitted to what the original layer makes, on the inputs that it gets now.

What a layer reads has changed by the factorisations before it. With x what it reads now and y what the original makes
of the original inputs, M and b are the ridge regression of y on x, moved from the original's weight and bias; how
strong the ridge is, is decided by what it gains on the half of the samples that it was not fitted to. What the layer's
factors are then nearest to is M, in the measure of x about its mean, so that the bias is right for the factors: of a
matrix that is reduced-rank regression (Izenman, Reduced-Rank Regression for the Multivariate Linear Model, 1975).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from graphopt.analysis.observe import observe
from graphopt.model import Model
from graphopt.passes._covariance import rows_of
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Problem
from graphopt.passes._output_error import OutputError
from graphopt.passes._rank_options import Made, Option, Problems
from graphopt.rewriter import Node, Rewriter

__all__ = ["refit"]

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""In units of the mean square of a number that is read."""
_WIDEST = 4096
"""Numbers that one output reads, beyond which nothing is fitted."""
_ROWS = 32
"""For each number that an output reads: of more rows some are left out."""

Batches = Sequence[Sequence[Tensor]]


def refit(rw: Rewriter, problems: Problems, made: Mapping[Whole, tuple[Option, Made]]) -> None:
    """Fit factors in the order of the layers, and keep that if the outputs are nearer.

    Args:
        made: for layers of the original, in order, what has been put in their places in `rw`. Neighbours that read one
            value are fitted together.
    """
    original, calib = problems.model, problems.calib
    trial = Rewriter(rw.model.clone(share_tensors=True))
    changed: dict[str, Tensor] = {}
    for _, group in groupby(made.items(), key=lambda pair: pair[0].source):
        fits = [_Fit(trial, problems, whole, *placed) for whole, placed in group if _may_fit(whole)]
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


def _may_fit(whole: Whole) -> bool:
    return not whole.embedding and whole.columns <= _WIDEST


class _Enough(Exception):
    """All that was to be seen of a run has been seen."""


def _look(model: Model, original: Model, calib: Batches, fits: Sequence[_Fit]) -> None:
    """Show what layers read and should make, batch by batch."""
    for batch in calib if fits else ():
        made = _seen(original, batch, {fit.whole.node for fit in fits})
        read = _seen(model, batch, {fit.source for fit in fits})
        for fit in fits:
            fit.add(read[fit.source], made[fit.whole.node], len(calib))


def _seen(model: Model, batch: Sequence[Tensor], nodes: Set[Node]) -> dict[Node, Tensor]:
    """The values of nodes; what comes after them is not run."""
    seen: dict[Node, Tensor] = {}

    def keep(node: Node, value: Tensor) -> None:
        seen[node] = value
        if len(seen) == len(nodes):
            raise _Enough

    with suppress(_Enough):
        observe(model, [batch], {node: partial(keep, node) for node in nodes})
    return seen


class _Fit:
    """The factors of one layer."""

    def __init__(self, trial: Rewriter, problems: Problems, whole: Whole, option: Option, made: Made) -> None:
        named = {node.name: node for node in trial.graph.nodes}
        self.problems, self.whole, self.option, self.trial = problems, whole, option, trial
        self.source: Node = named[made.calls[0].name].args[0]
        self.tensors = [named[node.name] for node in made.tensors]
        self.bias, self.fixed = None, None
        rw = Rewriter(problems.model)
        self.start = whole.dense(rw).double().reshape(whole.groups, -1, whole.columns)
        if whole.bias is not None:
            bias = rw.tensor(whole.bias)
            assert bias is not None
            if rw.why_shared(whole.bias, whole.node) is None:
                self.bias = named[whole.bias.name]
                self.start = torch.cat((self.start, bias.double().reshape(whole.groups, -1, 1)), 2)
            else:
                self.fixed = bias
        self.halves = [_Sums(whole, offset=self.bias is not None) for _ in range(2)]

    def add(self, x: Tensor, y: Tensor, batches: int) -> None:
        """Take in what the layer reads now, and what it made of what the original read, in one of some batches."""
        y = y if self.fixed is None else y - self.fixed.reshape(-1, *[1] * self.whole.kernel.axes)
        count = y.numel() // self.whole.kernel.outputs
        step = max(1, batches * count // (_ROWS * self.whole.columns))
        for half, (rows, wanted) in _rows(self.whole, x, y):
            self.halves[half].add(rows[:, ::step], wanted[:, ::step])

    def found(self) -> Iterator[tuple[Node, Tensor]]:
        """Tensors with their new values."""
        whole, form, n = self.whole, self.option.form, self.whole.columns
        assert form is not None
        best, sums = _with_best_ridge(self.halves, self.start)
        matrix, mean, moments = best[..., :n], sums.mean, sums.moments
        outer = self.problems.outer.get(whole.node.name)
        dense = matrix.reshape(whole.kernel.weight.shape)
        problem = Problem(whole, dense, self.problems.solver, moments, outer, self.problems.seed)
        factors = form.factors(problem, self.option.ranks)
        for node, factor in zip(self.tensors, factors, strict=True):
            yield node, factor.to(self.trial.params[str(node.target)]).contiguous()
        if self.bias is not None:
            lost = matrix - form.dense(whole, factors).reshape(matrix.shape)
            value = best[..., n] + (lost @ mean[..., None])[..., 0]
            yield self.bias, value.reshape(-1).to(self.trial.params[str(self.bias.target)])


def _rows(whole: Whole, z: Tensor, y: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Which half of the samples they are of, and what the layer reads [groups, rows, n] and should make [groups, rows,
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

    @property
    def mean(self) -> Tensor:
        """[groups, n] of what is read; zeros where no bias could make up for it."""
        if not self.offset:
            return torch.zeros(self.zz.shape[:2], dtype=torch.float64)
        return self.zz[:, :-1, -1] / max(self.count, 1)

    @property
    def moments(self) -> Tensor:
        """[groups, n, n] about the mean."""
        size = self.zz.shape[-1] - self.offset
        mean = self.mean
        return self.zz[:, :size, :size] - self.count * mean[:, :, None] * mean[:, None]

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


def _with_best_ridge(halves: Sequence[_Sums], start: Tensor) -> tuple[Tensor, _Sums]:
    """The regression on all samples, and their sums."""
    first, second = halves
    tried = {ridge: second.error(first.moved(start, ridge)) for ridge in _RIDGES} if second.count else {}
    ridge = min(tried, key=lambda one: tried[one]) if tried else max(_RIDGES)
    first.zz += second.zz
    first.yz += second.yz
    first.count += second.count
    return first.moved(start, ridge), first
