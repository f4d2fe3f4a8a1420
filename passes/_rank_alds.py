"""Ranks, foldings and groups as ALDS chooses them: the largest relative error of a layer is made as small as a budget
allows, in two steps that alternate.

The relative error of a layer at rank j is the largest singular value number j + 1 among its folded groups, over the
largest one of the folded weight. The first step finds the bound on all errors that meets the budget, with the folding
and the groups of every layer as they are; the second one finds for every layer the folding and the groups with the
least error at the cost that it has been given. (Liebenwein et al., Compressing Neural Networks: Towards Determining the
Optimal Layer-wise Decomposition, NeurIPS 2021, algorithm 1.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_problem import Problem
from graphopt.passes._rank_choice import Chosen, Table
from graphopt.passes._rank_options import Option
from graphopt.passes._rank_prices import Price
from graphopt.solve import BudgetError

__all__ = ["Alds"]

_SEEDS, _TURNS = 15, 4
_PARTS = range(1, 10)
_MATRIX = "linear"
_FOLDINGS: dict[str, tuple[int, ...] | None] = {"kxk-1x1": None, "1xk-kx1": (1,), "kx1-1xk": (0,), "1x1-kxk": ()}


@dataclass(frozen=True)
class _Scheme:
    """One folding of a layer: its errors [ranks + 1] by rank, falling to zero, and what each rank costs."""

    form: Folded
    errors: np.ndarray
    each: float

    def rank(self, bound: float) -> int:
        """The smallest one whose error is within the bound."""
        return max(1, int((self.errors > bound).sum()))

    def affordable(self, budget: float) -> int:
        return min(int(budget / self.each), len(self.errors) - 1)


class Alds:
    """The schemes of layers, and the choice among them.

    Args:
        problems: of layers; the weights alone are looked at.
    """

    def __init__(self, problems: Iterable[Problem], price: Price, seed: int) -> None:
        self.price, self.seed = price, seed
        self.schemes: dict[str, list[_Scheme]] = {}
        self.costs: dict[str, float] = {}
        for problem in problems:
            if not problem.whole.embedding:
                name = problem.whole.node.name
                self.schemes[name] = list(_schemes(problem, price))
                self.costs[name] = price.layer(problem.whole)

    @property
    def table(self) -> Table:
        """Of every layer as it is and at its smallest."""
        return {
            name: [
                Option(name, None, (), 0.0, self.costs[name]),
                *(Option(name, s.form, (1,), float(s.errors[1]) ** 2, s.each) for s in schemes),
            ]
            for name, schemes in self.schemes.items()
        }

    def choose(self, budget: float) -> Chosen:
        """The choice of the best of several random starts.

        Raises:
            BudgetError: when rank 1 everywhere costs more.
        """
        if not self.schemes:
            return {}
        generator = np.random.default_rng(self.seed)
        best: tuple[float, list[_Scheme]] | None = None
        for start in range(_SEEDS):
            schemes = [
                options[0 if not start else int(generator.integers(len(options)))] for options in self.schemes.values()
            ]
            for turn in range(_TURNS + 1):
                bound = self._bound(schemes, budget)
                if bound is not None and (best is None or bound < best[0]):
                    best = bound, schemes
                if bound is None or turn == _TURNS:
                    break
                schemes = self._local(schemes, bound)
        if best is None:
            raise BudgetError(f"a budget of {budget:.6g} cannot be met")
        return self._options(*best)

    def _bound(self, schemes: Sequence[_Scheme], budget: float) -> float | None:
        """The least bound on all errors that meets the budget."""
        bounds = np.unique(np.concatenate([scheme.errors for scheme in schemes]))
        low, high = 0, len(bounds) - 1
        if self._cost(schemes, bounds[high]) > budget:
            return None
        while low < high:
            middle = (low + high) // 2
            fits = self._cost(schemes, bounds[middle]) <= budget
            low, high = (low, middle) if fits else (middle + 1, high)
        return float(bounds[high])

    def _cost(self, schemes: Sequence[_Scheme], bound: float) -> float:
        return sum(self._given(name, scheme, bound) for name, scheme in zip(self.schemes, schemes, strict=True))

    def _given(self, name: str, scheme: _Scheme, bound: float) -> float:
        return min(self.costs[name], scheme.rank(bound) * scheme.each)

    def _local(self, schemes: Sequence[_Scheme], bound: float) -> list[_Scheme]:
        found = []
        for (name, options), scheme in zip(self.schemes.items(), schemes, strict=True):
            given = self._given(name, scheme, bound)
            possible = [one for one in options if one.affordable(given) >= 1] or [scheme]
            found.append(min(possible, key=lambda one: one.errors[max(one.affordable(given), 1)]))
        return found

    def _options(self, bound: float, schemes: Sequence[_Scheme]) -> Chosen:
        chosen: Chosen = {}
        for name, scheme in zip(self.schemes, schemes, strict=True):
            rank = scheme.rank(bound)
            whole = self.costs[name] <= rank * scheme.each
            made = Option(name, scheme.form, (rank,), float(scheme.errors[rank]) ** 2, rank * scheme.each)
            chosen[name] = Option(name, None, (), 0.0, self.costs[name]) if whole else made
        return chosen


def _schemes(problem: Problem, price: Price) -> Iterator[_Scheme]:
    whole = problem.whole
    for name, first in (_FOLDINGS if whole.kernel.axes else {_MATRIX: None}).items():
        largest = 0.0
        for parts in _PARTS:
            form = Folded(name if parts == 1 else "grouped", first, parts, matrix=name == _MATRIX)
            if form.why_not(whole) is not None:
                continue
            values = torch.linalg.svdvals(form.folded(whole, problem.weight))
            largest = largest or float(values.max())
            errors = values.flatten(0, 1).amax(0).numpy() / (largest or 1.0)
            yield _Scheme(form, np.append(errors, 0.0), price.factors(whole, form, (1,)))
