"""Which factors every layer gets, for what a user has asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

from graphopt.deployed import Deployed
from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.passes._factor_forms import Form, Ranks
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import Solver
from graphopt.passes._rank_alds import Alds
from graphopt.passes._rank_choice import Chosen, Planner, Table, least_error, least_loss, least_worst, smallest_enough
from graphopt.passes._rank_influence import Influence
from graphopt.passes._rank_options import Option, Problems, Ranking, empty_copy, options_of
from graphopt.passes._rank_prices import Macs, Params, Price, Seconds, cheaper
from graphopt.rewriter import Rewriter

__all__ = ["ALLOCATIONS", "Allocation", "Asked", "choose"]

Allocation: TypeAlias = Literal["solve", "minimax", "alds"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

_COUNTED, _MEASURED, _FINEST = 12, 6, 4096
"""How many ranks of a form are looked at: under a budget that is counted, under one that is measured, and where the
errors of all are known at once and the smallest is wanted that is enough."""


@dataclass(frozen=True)
class Asked:
    """What a user wants.

    Attributes:
        budget: `params`, `macs`, `latency`, `energy` or `rank`, and `value`, how much of it.
        step: of which ranks are multiples.
        watch: measures on the target; None where nothing is measured.
    """

    budget: str
    value: float
    forms: tuple[Form, ...]
    solver: Solver
    allocation: Allocation
    step: int
    watch: Stopwatch | None
    seed: int


def choose(rw: Rewriter, asked: Asked, problems: Problems, layers: Sequence[Whole]) -> Chosen:
    """An option of every layer of the original, by the name of its call. Reasons and what is reached go to `rw`.

    Raises:
        BudgetError: when the budget cannot be met.
        UsageError: for a rank that no layer has.
    """
    if not layers:
        return {}
    look = Rewriter(problems.model)
    prices = _prices(look, asked)
    if asked.allocation == "alds":
        weights_alone = Problems(problems.model, (), "svd", {}, asked.seed)
        alds = Alds(weights_alone.of(layers), prices[0], asked.seed)
        planner = Planner(alds.table, prices[0], lambda _, limit: alds.choose(limit))
    else:
        if asked.budget == "rank":
            _check_rank(asked, layers)
        table, weights = _table(rw, look, asked, problems, layers, prices)
        if asked.budget in ("energy", "rank"):
            return smallest_enough(table, asked.value) if asked.budget == "energy" else least_error(table)
        by = least_worst if asked.allocation == "minimax" else partial(least_loss, weights=weights)
        planner = Planner(table, prices[0], by)
    if asked.budget == "latency" and asked.watch is not None:
        named = {whole.node.name: whole for whole in layers}

        def copy(plan: Chosen) -> Model:
            return empty_copy(problems.model, [(named[n], option) for n, option in plan.items() if option.form])

        planner.measure_by(Deployed(problems.model, asked.watch), copy)
    chosen = planner.within(asked.value)
    rw.findings["achieved"] = {asked.budget: planner.reached}
    return {
        whole.node.name: chosen.get(whole.node.name, Option(whole.node.name, None, (), 0.0, 0.0)) for whole in layers
    }


def _prices(look: Rewriter, asked: Asked) -> list[Price]:
    """That of the budget first; where a target is given as well, what is not faster there is refused."""
    measured: list[Price] = [] if asked.watch is None else [Seconds(look, asked.watch)]
    if asked.budget == "latency":
        return measured
    return [Macs(look) if asked.budget == "macs" else Params(look), *measured]


def _table(
    rw: Rewriter, look: Rewriter, asked: Asked, problems: Problems, layers: Sequence[Whole], prices: Sequence[Price]
) -> tuple[Table, dict[str, float]]:
    """The options of every layer, and how much of its error arrives at the outputs."""
    ranking = _ranking(look, asked, prices[0])
    weighs = bool(problems.calib) and asked.allocation == "solve" and asked.budget not in ("energy", "rank")
    influence = Influence(problems.model, problems.calib) if weighs else None
    table: dict[str, Sequence[Option]] = {}
    weights: dict[str, float] = {}
    for problem in problems.of(layers):
        name = problem.whole.node.name
        table[name] = options_of(problem, asked.forms, ranking, prices, rw.skip)
        if influence is not None:
            weights[name] = influence.of(problem, table[name], asked.value)
        del problem  # before the numbers of the next one are there
    return table, weights


def _ranking(look: Rewriter, asked: Asked, price: Price) -> Ranking:
    if asked.budget == "rank":
        return lambda whole, form: [_ranks_at(form.full(whole), asked.value)]
    measured = isinstance(price, Seconds)
    counted = Macs(look) if measured else price

    def ranks(whole: Whole, form: Form) -> list[Ranks]:
        count = _MEASURED if measured else 4 * _COUNTED if form.is_direct else _COUNTED
        if asked.budget == "energy":
            count = _FINEST if form.is_direct else 4 * _COUNTED
        return cheaper(counted, whole, form, asked.step, count)

    return ranks


def _ranks_at(full: Ranks, rank: float) -> Ranks:
    """A rank, but none above the full one; or a part of it."""
    return tuple(max(1, math.floor(rank * size)) if rank < 1 else min(int(rank), size) for size in full)


def _check_rank(asked: Asked, layers: Sequence[Whole]) -> None:
    full = [max(form.full(whole)) for whole in layers for form in asked.forms if form.why_not(whole) is None]
    if full and asked.value > max(full):
        raise UsageError(f"rank is {asked.value:g}, the largest that a layer has is {max(full)}")
