"""Projection of weights to where data and weight meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.check import relative_error
from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._factor_problem import Problem
from graphopt.passes._rank_options import Problems
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["ProjectUtilized"]

_ROUNDS = 8
_TURNS = 20


@dataclass(frozen=True)
class ProjectUtilized(Pass):
    """Take out of every weight what the data does not use, so that its rank is the utilised one.

    What:
        A layer makes next to nothing along some directions of its outputs, and reads next to nothing along some
        directions of its inputs. Its weight is projected to the others: what it computes on such data stays, its rank
        falls. Nothing becomes smaller; `low-rank{energy=...}` and `graphopt rank` make use of it.

    Algebra:
        W' = U U^T W Q Q^T for W [out, in * taps]: Q are eigenvectors q of C = sum x x^T (see `low-rank`), but for those
        with l |W q|^2 <= t^2 |W x|^2 / (2 n), l the eigenvalue and n the number of all; U are those of W C W^T, but for
        those with eigenvalues <= t^2 |W x|^2 / (2 m). Both are repeated until all stay. The relative error of the
        layer's outputs is about `tolerance` t at most.

    When it applies:
        To linear layers, products with a stored matrix, and convolutions, groups each by themselves. Left alone, each
        with the reason: embeddings; weights that are shared, masked or computed; layers that use all directions.
        Options: `tolerance`; `only` and `leave`, names of layers or of modules that they are in.

    Safety:
        Close on the calibration data: if the outputs change by more than a hundredth, it is done again with a quarter
        of the tolerance. On other data what is new may be lost. Needs calibration data, and more rows than inputs.

    Cost:
        A run over the calibration data for every try, moments of n x n numbers for a layer that reads n, of a few
        layers at a time, and two eigendecompositions for each.

    Source:
        Garg et al., Revealing the Utilized Rank of Subspaces of Learning in Neural Networks, 2024.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).eval()
        >>> x = torch.randn(200, 3) @ torch.randn(3, 16)
        >>> model = graphopt.capture(net, (x,))
        >>> projected, (report,) = graphopt.run(model, "project-utilized", calib=[(x,)])
        >>> report.findings["layers"][0]["rank"], int(torch.linalg.matrix_rank(projected.params["0.weight"], rtol=1e-5))
        (3, 3)
    """

    name: ClassVar[str] = "project-utilized"
    contract: ClassVar[Contract] = Contract.CLOSE(1e-2)

    tolerance: float = 1e-3
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    def run(self, rw: Rewriter) -> None:
        if not 0 < self.tolerance < 1:
            raise UsageError(f"tolerance is {self.tolerance:g}, it has to be between 0 and 1")
        if not rw.calib:
            raise UsageError(
                "what is utilised is seen on calibration data, and there is none",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        if rw.model.mode == "train":
            raise UsageError("weights are projected in evaluation mode", todo="call eval() on the model first")
        original = rw.model.clone(share_tensors=True)
        layers = self._layers(rw, original)
        expected = [original.call_flat(batch) for batch in rw.calib]
        tolerance = self.tolerance
        for _ in range(_ROUNDS):
            found = dict(_projected(Problems(original, rw.calib, "activation", {}, 0), layers, tolerance))
            error = _error(original, found, rw.calib, expected)
            if error <= (self.contract.rtol or 0.0) / 2:
                break
            tolerance /= 4
        else:
            raise UsageError(f"the outputs change by {error:.1e} with a tolerance of {tolerance * 4:.1e}")
        self._put_in(rw, layers, found)
        rw.findings |= {"tolerance": tolerance, "output error": error}

    def _layers(self, rw: Rewriter, original: Model) -> list[Whole]:
        layers = []
        for node, whole in find_layers(Rewriter(original), factors=True):
            if isinstance(whole, str):
                rw.skip(node, whole)
            elif whole.embedding:
                rw.skip(node, "each of its rows is read by itself")
            elif (not self.only or whole.is_in(self.only)) and not whole.is_in(self.leave):
                layers.append(whole)
        return layers

    def _put_in(self, rw: Rewriter, layers: list[Whole], found: dict[str, Any]) -> None:
        rows = []
        for whole in layers:
            weight, rank, why = found[whole.node.name]
            here = whole.onto(rw)
            if weight is None:
                rw.skip(here.node, why)
                continue
            rw.set_tensor(here.weight, weight, f"projected to {rank} utilised directions")
            full = whole.groups * min(whole.kernel.outputs // whole.groups, whole.columns)
            rows.append({"layer": whole.name, "rank": rank, "of": full})
        rw.findings["layers"] = rows


def _projected(
    problems: Problems, layers: list[Whole], tolerance: float
) -> Iterator[tuple[str, tuple[Tensor | None, int, str]]]:
    """For every layer its weight in the layout and dtype of the stored one, or None, its rank, and why it stays."""
    for problem in problems.of(layers):
        whole = problem.whole
        weight, rank = _projection(problem, tolerance)
        stored = problems.model.params[str(whole.weight.target)]
        full = whole.groups * min(whole.kernel.outputs // whole.groups, whole.columns)
        if not problem.energy:
            yield whole.node.name, (None, 0, "it makes only zeros of the data")
        elif float((weight - problem.weight).norm()) <= 1e-5 * float(problem.weight.norm()):
            yield whole.node.name, (None, rank, f"all {rank} directions of its weight are used, of {full}")
        else:
            yield whole.node.name, (whole.stored(weight).to(stored), rank, "")


def _projection(problem: Problem, tolerance: float) -> tuple[Tensor, int]:
    """The projected weight, and the sum of the ranks of its groups."""
    moments = problem.moments
    assert moments is not None
    matrix = problem.weight.reshape(problem.whole.groups, -1, problem.whole.columns)
    values, inner = torch.linalg.eigh(moments)
    rank = -1
    for _ in range(_TURNS):
        read = values.clamp(min=0) * (matrix @ inner).square().sum(1)  # [groups, n]
        kept = (read > _limit(read, tolerance)).to(matrix)
        projected = ((matrix @ inner) * kept[:, None]) @ inner.transpose(1, 2)
        made, outer = torch.linalg.eigh(projected @ moments @ projected.transpose(1, 2))
        used = (made > _limit(made, tolerance)).to(matrix)
        matrix = (outer * used[:, None]) @ (outer.transpose(1, 2) @ projected)
        now = int(torch.minimum(kept.sum(1), used.sum(1)).sum())
        if now == rank:
            break
        rank = now
    return matrix.reshape(problem.weight.shape), rank


def _limit(energies: Tensor, tolerance: float) -> Tensor:
    """Of energies [groups, n]: what one direction may have at most to go."""
    return tolerance**2 * energies.clamp(min=0).sum(1, keepdim=True) / (2 * energies.shape[1])


def _error(
    original: Model, found: dict[str, tuple[Tensor | None, int, str]], calib: Any, expected: list[list[Tensor]]
) -> float:
    """The largest error of an output on the data, relative to the largest value of it."""
    copy = original.clone(share_tensors=True)
    rw = Rewriter(copy)
    named = {whole.node.name: whole for _, whole in find_layers(rw, factors=True) if isinstance(whole, Whole)}
    for name, (weight, _, _) in found.items():
        if weight is not None:
            rw.set_tensor(named[name].weight, weight, "tried")
    copy.touch()
    with torch.no_grad():
        pairs = [
            (a, b)
            for batch, wanted in zip(calib, expected, strict=True)
            for a, b in zip(copy.call_flat(batch), wanted, strict=True)
        ]
    return max((relative_error(a, b) for a, b in pairs if b.is_floating_point()), default=0.0)
