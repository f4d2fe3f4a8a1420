"""What ranks layers have, and how many of them the data makes use of.

Of a weight W [out, in * taps] with singular values s and of what it makes of data with moments C:

- the rank: how many s there are, but for rounding;
- the effective rank: exp(-sum p ln p) with p = s^2 / sum s^2 (Roy and Vetterli, The Effective Rank: A Measure of
  Effective Dimensionality, 2007), of W, and of W C^1/2;
- the utilised rank: how many directions of the outputs hold a part of their energy, that is, the fewest eigenvalues of
  W C W^T that add up to that part of all. It is the rank of W projected to where data and weight meet. (Garg et al.,
  Revealing the Utilized Rank of Subspaces of Learning in Neural Networks, 2024.)

Of a layer in groups the ranks of all groups are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._factor_problem import Problem
from graphopt.passes._rank_options import Problems
from graphopt.rewriter import Rewriter

__all__ = ["Row", "rank_rows"]


@dataclass(frozen=True)
class Row:
    """The ranks of one layer.

    Attributes:
        outputs, inputs: of its weight as a matrix, for each group.
        full: the largest rank that it could have.
        effective: of the weight; `data_effective` of what it makes of the data.
    """

    layer: str
    operator: str
    outputs: int
    inputs: int
    groups: int
    full: int
    rank: int
    effective: float
    data_effective: float
    utilised: int


def rank_rows(
    model: Model, calib: Sequence[Sequence[Tensor]], *, energy: float = 0.99
) -> tuple[list[Row], dict[str, str]]:
    """A row for every layer, in order, and the reasons why others have none.

    Args:
        energy: of the outputs, that utilised directions hold.

    Raises:
        UsageError: for a part that is none, and where there is no data.
        InputError: for weights or values that are not finite.
    """
    if not 0 < energy <= 1:
        raise UsageError(f"energy is {energy:g}, it has to be above 0 and at most 1")
    if not calib:
        raise UsageError("how much of a rank is utilised is seen on calibration data, and there is none")
    found = list(find_layers(Rewriter(model), factors=True))
    layers = [whole for _, whole in found if isinstance(whole, Whole)]
    rows = {
        problem.whole.node: _row(problem, energy) for problem in Problems(model, calib, "activation", {}, 0).of(layers)
    }
    return [rows[whole.node] for whole in layers], {node.name: why for node, why in found if isinstance(why, str)}


def _row(problem: Problem, energy: float) -> Row:
    whole = problem.whole
    matrix, moments = problem.weight, problem.moments
    matrix = matrix.T[None] if whole.embedding else matrix.reshape(whole.groups, -1, whole.columns)
    assert moments is not None
    read = matrix * moments if whole.embedding else matrix @ moments
    made = torch.linalg.eigvalsh(read @ matrix.transpose(1, 2)).clamp(min=0).flip(-1)
    values = torch.linalg.svdvals(matrix)
    outputs, inputs = matrix.shape[1:]
    return Row(
        layer=whole.name,
        operator=str(whole.node.target).removeprefix("aten.").split(".")[0],
        outputs=outputs,
        inputs=inputs,
        groups=whole.groups,
        full=whole.groups * min(outputs, inputs),
        rank=int((values > _NOISE * values[:, :1]).sum()),
        effective=sum(map(_effective, values.square())),
        data_effective=sum(map(_effective, made)),
        utilised=sum(_enough(group, energy) for group in made),
    )


_NOISE = 1e-6
"""Of the largest singular value: what is below is rounding of float32."""


def _effective(energies: Tensor) -> float:
    total = energies.sum()
    if not total:
        return 0.0
    parts = energies[energies > 0] / total
    return float((-(parts * parts.log()).sum()).exp())


def _enough(energies: Tensor, part: float) -> int:
    """How many of falling energies hold a part of their sum."""
    total = float(energies.sum())
    if not total:
        return 0
    held = energies.cumsum(0) / total
    return min(int((held < part * (1 - 1e-12)).sum()) + 1, len(energies))
