"""The last factor of a layer, fitted to what the original layer makes, on the inputs that it gets now.

What a layer reads has changed by the factorisations before it. With z what its last factor reads now and y what the
original makes of the original inputs, the factor A and the bias b move to the ridge regression of y on z, towards what
they were. How strong the ridge is, is decided by what it gains on the half of the samples that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def refit_last(rw: Rewriter, original: Model, calib: Batches, made: dict[str, Node]) -> None:
    """Fit factors in the order of the layers, and keep that if the outputs are nearer.

    Args:
        made: by the name of a layer in `original`, the last call of its factors.
    """
    trial = Rewriter(rw.model.clone(share_tensors=True))
    named = {node.name: node for node in trial.graph.nodes}
    changed: dict[str, Tensor] = {}
    for name, node in made.items():
        whole = read_whole(trial, named[node.name])
        if isinstance(whole, Whole) and not whole.embedding and whole.columns <= _WIDEST:
            for tensor, value in _fitted(trial, whole, original, name, calib):
                trial.set_tensor(tensor, value, "fitted")
                changed[str(tensor.target)] = value
    trial.model.touch()
    outputs = OutputError(original, calib)
    apart, fitted = outputs.of(rw.model), outputs.of(trial.model)
    rw.findings["output error"] = {"factorised": apart, "refitted": fitted}
    for node in [n for n in rw.graph.nodes if n.op == "get_attr" and str(n.target) in changed and fitted < apart]:
        rw.set_tensor(node, changed[str(node.target)], "fitted to what the original layer makes")


def _fitted(trial: Rewriter, whole: Whole, original: Model, name: str, calib: Batches) -> Iterator[tuple[Node, Tensor]]:
    """The tensors of a last factor with their new values."""
    bias = None if whole.bias is None or trial.why_shared(whole.bias, whole.node) else whole.bias
    fixed = None if bias is not None or whole.bias is None else trial.tensor(whole.bias)
    halves = [_Sums(whole, offset=bias is not None) for _ in range(2)]
    for batch in calib:
        z, y = _value(trial.model, batch, whole.source.name), _value(original, batch, name)
        for half, (rows, wanted) in _rows(whole, z, y if fixed is None else y - _spread(fixed, y, whole)):
            halves[half].add(rows, wanted)
    weight = trial.tensor(whole.weight)
    start = whole.dense(trial).reshape(whole.groups, -1, whole.columns)
    old = None if bias is None else trial.tensor(bias)
    if old is not None:
        start = torch.cat((start, old.double().reshape(whole.groups, -1, 1)), 2)
    found = _with_best_ridge(halves, start)
    assert weight is not None
    dense = found[..., : whole.columns].reshape(whole.kernel.weight.shape)
    yield whole.weight, whole.stored(dense).to(weight)
    if bias is not None and old is not None:
        yield bias, found[..., -1].reshape(-1).to(old)


def _value(model: Model, batch: Sequence[Tensor], name: str) -> Tensor:
    """What the node of that name makes of a batch."""
    found: list[Tensor] = []
    observe(model, [batch], {node: found.append for node in model.graph.nodes if node.name == name})
    return found[0]


def _spread(bias: Tensor, y: Tensor, whole: Whole) -> Tensor:
    """A bias along the channels of y."""
    return bias.reshape(-1, *[1] * whole.kernel.axes).expand(y.shape[1:] if whole.kernel.axes else y.shape[-1:])


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
