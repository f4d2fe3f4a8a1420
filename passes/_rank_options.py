"""What every layer could become, what that costs and what it loses: the table that ranks are chosen from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from graphopt.errors import InputError
from graphopt.model import Model
from graphopt.passes._covariance import moments_of
from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_forms import Form, Ranks, Rows
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_pivots import Pivoted
from graphopt.passes._factor_problem import Problem, Solver
from graphopt.passes._factor_tensors import Polyadic, Tucker
from graphopt.passes._factor_trains import Train, TrainOfRows
from graphopt.passes._factor_writer import Inside
from graphopt.passes._rank_prices import Price
from graphopt.rewriter import Node, Rewriter

__all__ = ["FORMS", "Made", "Option", "Problems", "Ranking", "empty_copy", "options_of", "substitute"]

FORMS: dict[str, tuple[Form, ...]] = {
    "linear": (Folded("linear", matrix=True),),
    "kxk-1x1": (Folded("kxk-1x1"),),
    "1xk-kx1": (Folded("1xk-kx1", first=(1,)),),
    "kx1-1xk": (Folded("kx1-1xk", first=(0,)),),
    "1x1-kxk": (Folded("1x1-kxk", first=()),),
    "grouped": tuple(Folded("grouped", first=first, parts=k) for first in (None, ()) for k in (2, 4)),
    "tucker": (Tucker(),),
    "cp": (Polyadic(),),
    "tt": (Train(), Train(cores=3), TrainOfRows()),
    "embedding": (Rows(),),
    "pivoted": (Pivoted(Folded("linear", matrix=True)), Pivoted(Folded("kxk-1x1"))),
}
"""By the names that users choose them by."""

Ranking: TypeAlias = Callable[[Whole, Form], list[Ranks]]


@dataclass(frozen=True)
class Option:
    """A layer as it is (`form` is None), or with its factors.

    Attributes:
        layer: the name of its call.
        error: the square of what its outputs change by, relative to theirs (see `_factor_problem`).
        cost: in the unit of the budget.
    """

    layer: str
    form: Form | None
    ranks: Ranks
    error: float
    cost: float


class Problems:
    """The problems of layers, one after the other: numbers of one layer, or of a few, are in memory at a time."""

    def __init__(
        self, model: Model, calib: Sequence[Sequence[Tensor]], solver: Solver, outer: Mapping[str, Tensor], seed: int
    ) -> None:
        self.model, self.calib, self.solver, self.outer, self.seed = model, calib, solver, outer, seed

    def of(self, layers: Sequence[Whole]) -> Iterator[Problem]:
        """In any order.

        Raises:
            InputError: for a weight, or values that a layer reads, that are not finite.
        """
        rw = Rewriter(self.model)
        by_node = {whole.node: whole for whole in layers}
        if not self.calib:
            yield from (self._problem(rw, whole, None) for whole in layers)
            return
        for node, moments in moments_of(self.model, self.calib, by_node):
            yield self._problem(rw, by_node[node], moments.sum)
            del moments  # here and where problems are solved: the next ones are made before a name has another value

    def _problem(self, rw: Rewriter, whole: Whole, moments: Tensor | None) -> Problem:
        weight = whole.dense(rw)
        # Takes no memory; NaN counts as the least and the largest.
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight)):
            raise InputError(
                f"the weight of '{whole.name}' is not finite",
                why="an element of it is NaN or infinite",
                todo="train the model again, or leave the layer out (`leave`)",
            )
        return Problem(whole, weight, self.solver, moments, self.outer.get(whole.node.name), self.seed)


def options_of(
    problem: Problem,
    forms: Sequence[Form],
    ranking: Ranking,
    prices: Sequence[Price],
    note: Callable[[Node, str], None],
) -> list[Option]:
    """The layer as it is, and everything that is cheaper by all prices; a note where nothing is.

    Args:
        ranking: which ranks of a form are looked at.
        prices: the first one is the budget's.
    """
    whole = problem.whole
    limits = [price.layer(whole) for price in prices]
    found = [Option(whole.node.name, None, (), 0.0, limits[0])]
    dearer: list[tuple[float, str]] = []
    for form in forms:
        if form.why_not(whole) is not None or problem.solver not in form.solvers:
            continue
        costs: dict[Ranks, float] = {}
        wanted = ranking(whole, form)
        if not wanted:
            why = _why_dear(whole, form, tuple(1 for _ in form.full(whole)), prices, limits)
            dearer.append(why or (math.inf, f"no {form.name} is cheaper with a rank that is a multiple of the step"))
        for ranks in wanted:
            why = _why_dear(whole, form, ranks, prices, limits)
            if why is None:
                costs[ranks] = prices[0].factors(whole, form, ranks)
            else:
                dearer.append(why)
        errors = form.errors(problem, list(costs)) if costs else []
        for (ranks, cost), error in zip(costs.items(), errors, strict=True):
            relative = max(error, 0.0) / problem.energy if problem.energy else 0.0
            found.append(Option(whole.node.name, form, ranks, relative, cost))
    if len(found) == 1:
        note(whole.node, min(dearer)[1] if dearer else _why_none(problem, forms))
    return found


def _why_dear(
    whole: Whole, form: Form, ranks: Ranks, prices: Sequence[Price], limits: Sequence[float]
) -> tuple[float, str] | None:
    """By how much a form is not cheaper than the layer, and in words."""
    for price, limit in zip(prices, limits, strict=True):
        ours = price.factors(whole, form, ranks)
        if ours >= limit:
            named = " and ".join(map(str, ranks))
            return ours / limit if limit else math.inf, f"{form.name} of rank {named} {price.takes(ours, limit)}"
    return None


def _why_none(problem: Problem, forms: Sequence[Form]) -> str:
    reasons = {form.name: form.why_not(problem.whole) for form in forms}
    told = "; ".join(f"no {name}: {why}" for name, why in reasons.items() if why)
    return told or f"no form that was asked for has the solver '{problem.solver}'"


@dataclass(frozen=True)
class Made:
    """Factors in the place of a layer.

    Attributes:
        calls: theirs, in order; the last one makes what the layer made.
        tensors: theirs, in the order of `Form.factors`.
    """

    calls: list[Node]
    tensors: list[Node]


def substitute(rw: Rewriter, whole: Whole, option: Option, factors: Sequence[Tensor]) -> Made:
    """Put factors in the place of a layer.

    Raises:
        InputError: where they are not finite in the dtype of the weight.
    """
    dtype = rw.fake(whole.weight).dtype
    if any(not bool(torch.isfinite(factor.to(dtype)).all()) for factor in factors):
        raise InputError(f"the factors of '{whole.name}' would not be finite in {dtype}", todo="leave it out (`leave`)")
    form, writer = option.form, Inside(rw, whole)
    assert form is not None
    last = form.write(writer, whole, factors)
    ranks = ", ".join(map(str, option.ranks))
    rw.replace(whole.node, last, f"{form.name} of rank {ranks} for '{whole.name}'")
    return Made(writer.calls, writer.tensors)


def empty_copy(model: Model, chosen: Sequence[tuple[Whole, Option]]) -> Model:
    """A copy with factors of random numbers, to see what it costs."""
    copy = model.clone(share_tensors=True)
    rw = Rewriter(copy)
    places = [whole.onto(rw) for whole, _ in chosen]
    generator = torch.Generator().manual_seed(0)
    for whole, (_, option) in zip(places, chosen, strict=True):
        assert option.form is not None
        empty = option.form.empty(whole, option.ranks)
        drawn = [
            torch.randn(e.shape, generator=generator) if e.is_floating_point() else torch.arange(len(e)) for e in empty
        ]
        substitute(rw, whole, option, drawn)
    copy.touch()
    return copy
