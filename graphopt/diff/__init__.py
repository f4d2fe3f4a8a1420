"""What changed between two models: their graphs, weights, costs and numbers.

    found = graphopt.diff(a, b)
    print(found.summary())

Graphs are matched by structure and by the contents of weights; names break ties only (see `matching`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import ModuleType

import torch

from graphopt.diff.comparison import compare_views
from graphopt.diff.costs import CostDiff, compare_costs
from graphopt.diff.entries import Change, Entry, Pair
from graphopt.diff.filters import Filter
from graphopt.diff.histograms import Histogram, histogram
from graphopt.diff.latency import LatencyDiff, measure_both
from graphopt.diff.numbers import NumbersDiff, PairError, run_both
from graphopt.diff.origins import Origins, is_later, new_passes
from graphopt.diff.result import SCHEMA, GraphDiff, Side
from graphopt.diff.tensors import AxisMap, TensorDiff
from graphopt.diff.titles import common_path, title_of
from graphopt.diff.view import Item, View, view_of
from graphopt.errors import UsageError
from graphopt.model import Model

__all__ = [
    "SCHEMA",
    "AxisMap",
    "Change",
    "CostDiff",
    "Entry",
    "GraphDiff",
    "Histogram",
    "Item",
    "LatencyDiff",
    "NumbersDiff",
    "Pair",
    "PairError",
    "Side",
    "TensorDiff",
    "View",
    "diff",
    "histogram",
]


def diff(
    a: Model | str | os.PathLike[str],
    b: Model | str | os.PathLike[str],
    *,
    run: bool = False,
    inputs: Sequence[torch.Tensor] | None = None,
    latency: str | None = None,
    ignore: Iterable[str] = (),
    tolerance: float = 0.0,
    weights: bool = True,
    cost: bool = True,
    names: tuple[str, str] | None = None,
) -> GraphDiff:
    """Compare two models, of any formats. `diff(b, a)` says the same from the other side.

    Args:
        a, b: models, or what `graphopt.load` takes. Weights of `.gopt` files are mapped, not read into memory.
        run: run both on the same inputs and compare what matched nodes compute.
        inputs: flat tensor inputs of the first model to run both on (and then `run` is taken for granted); seeded
            ones without.
        latency: a backend, such as `tvm`, to compile both for and to measure them with.
        ignore: what to leave out: `weights`, `attributes`, `shapes`, `dtypes`, `operands`, a kind of entry such as
            `moved`, or `module=`, `operator=`, `tensor=`, `attribute=` with a pattern such as `classifier.*`.
        tolerance: relative difference up to which weights, attributes and, in a run, values count as equal.
        weights: whether to compare the contents of weights; without, only their shapes and dtypes.
        cost: whether to count what both cost.
        names: what to call the two; by default the files they are read from.

    Raises:
        UsageError: for a tolerance below zero, an unknown backend, or an `ignore` that names nothing.
        LoadError, UnsupportedError: as `graphopt.load`.
        InputError: when both are to be run and do not take the same inputs.
    """
    if not tolerance >= 0:
        raise UsageError(f"the tolerance is {tolerance}", todo="give a number from zero on, such as 1e-6")
    left_out = Filter.parse(ignore)
    sides = [_side(source, name) for source, name in zip((a, b), names or ("", ""), strict=True)]
    x, y = (side.view for side in sides)
    found = compare_views(x, y, tolerance=tolerance, weights=weights)
    kept = left_out.apply(found.entries, x, y)
    numbers = None
    if run or inputs is not None:
        numbers = run_both(x, y, found.values, inputs=inputs, tolerance=tolerance)
    return GraphDiff(
        a=sides[0],
        b=sides[1],
        entries=_described(kept, x, y),
        pairs=found.pairs,
        tensors=found.tensors,
        cost=compare_costs(x.model, y.model) if cost else None,
        numbers=numbers,
        latency=measure_both(x.model, y.model, latency) if latency is not None else None,
        ignored=len(found.entries) - len(kept),
        tolerance=tolerance,
    )


def _side(source: Model | str | os.PathLike[str], name: str) -> Side:
    if isinstance(source, Model):
        return Side(name, view_of(source))
    from graphopt.frontends import load

    return Side(name or os.fspath(source), view_of(load(source, mapped=True)))


def _described(entries: Sequence[Entry], a: View, b: View) -> tuple[Entry, ...]:
    """The entries with titles, modules, and the passes that did it."""
    histories = a.model.history, b.model.history
    known, later = new_passes(*histories), is_later(*histories)
    origins = Origins(a, b, known) if later else Origins(b, a, known)
    described = []
    for entry in entries:
        passes = origins.behind(entry if later else entry.mirrored())
        described.append(replace(entry, title=title_of(entry, a, b), path=common_path(entry, a, b), passes=passes))
    return tuple(described)


class _Callable(ModuleType):
    """`graphopt.diff` is this package once it is imported, whatever it was before, and is called as the function."""

    __call__ = staticmethod(diff)


sys.modules[__name__].__class__ = _Callable
