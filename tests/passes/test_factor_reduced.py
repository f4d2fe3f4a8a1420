"""Layers with very many outputs: factors through a square matrix, the outputs' part of the Fisher information."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt as go
from graphopt.passes import _factor_pivots, _factor_reduced, _rank_fisher
from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_forms import Form
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._factor_pivots import Pivoted
from graphopt.passes._factor_problem import Problem
from graphopt.passes._rank_fisher import fisher
from graphopt.rewriter import Rewriter
from tests.passes.test_factor_forms import Single, gives_back, linear

MATRIX = Folded("linear", matrix=True)


@pytest.fixture(scope="module", autouse=True)
def small_counts_as_large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_factor_reduced, "_LARGE", 1)
        patch.setattr(_factor_reduced, "_ROWS", 40)
        patch.setattr(_factor_pivots, "_ROWS", 7)
        yield


def ordinary(problem: Problem) -> Problem:
    """The same problem, solved with the whole weight."""
    made = replace(problem)
    made.__dict__["reduced"] = None
    return made


def counted(single: Single, solver: str, *, data: bool) -> Problem:
    problem = single.problem("svd" if solver == "svd" else "activation", data=data)
    if solver == "fisher":
        counts = torch.rand(1, single.whole.kernel.outputs, dtype=torch.float64) + 0.01
        problem = replace(problem, solver="fisher", outer=counts)
    return problem


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 8), st.integers(2, 5), st.sampled_from((MATRIX, Pivoted(MATRIX))),
    st.sampled_from(("svd", "activation", "fisher")), st.booleans(), st.sampled_from((1, 3, 40)), st.integers(0, 9),
)  # fmt: skip
def test_it_finds_what_the_whole_weight_finds(
    inputs: int, times: int, form: Form, solver: str, data: bool, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    single = linear(inputs, times * inputs + 1, rows)
    problem = counted(single, solver, data=data)
    assert problem.reduced is not None and problem.reduced.matrix.shape == (inputs, inputs)
    same = ordinary(problem)
    assert problem.energy == pytest.approx(same.energy, rel=1e-9)
    wanted = [(rank,) for rank in range(1, inputs + 1)]
    assert form.errors(problem, wanted) == pytest.approx(form.errors(same, wanted), rel=1e-6, abs=1e-9 * same.energy)
    for ranks in wanted:
        factors = form.factors(problem, ranks)
        assert [f.shape for f in factors] == [f.shape for f in form.empty(single.whole, ranks)]
        measured = same.error(form.dense(single.whole, factors))
        assert measured == pytest.approx(form.errors(same, [ranks])[0], rel=1e-4, abs=1e-9 * same.energy)


@pytest.mark.parametrize("form", [MATRIX, Pivoted(MATRIX)])
@pytest.mark.parametrize("data", [True, False])
def test_full_rank_gives_the_layer_back(form: Form, data: bool) -> None:
    gives_back(linear(6, 40, rows=3), form, data)


def test_a_weight_of_lower_rank_is_found_and_near_misses_are_left() -> None:
    low = nn.Linear(6, 40)
    with torch.no_grad():
        low.weight.copy_(torch.randn(40, 2) @ torch.randn(2, 6))
    single = Single(low, torch.randn(1, 30, 6, dtype=torch.float64))
    problem = single.problem()
    for form in (MATRIX, Pivoted(MATRIX)):
        for rank in (2, 6):
            assert problem.error(form.dense(single.whole, form.factors(problem, (rank,)))) < 1e-14 * problem.energy
    assert linear(6, 12).problem().reduced is None  # not more than twice as long
    assert linear(6, 40).problem("semi-nmf").reduced is None
    assert linear(6, 40).problem("fisher").reduced is None  # outputs that count together


@pytest.mark.parametrize("form", [MATRIX, Pivoted(MATRIX)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_factors_keep_a_dtype_that_holds_the_weight(form: Form, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(8, 50)).to(dtype).eval()
    x = torch.randn(30, 8, dtype=dtype)
    model = go.capture(net, (x,))
    ((_, whole),) = find_layers(Rewriter(model))
    assert isinstance(whole, Whole)
    stored = whole.dense(Rewriter(model))
    assert stored.dtype == dtype
    factors = form.factors(Problem(whole, stored), (8,))
    assert [factor.dtype for factor in factors[:2]] == [torch.float32, torch.float32]
    dense = form.dense(whole, factors)
    assert dense.dtype == torch.float32 and (dense - stored).abs().max() < 1e-6
    name = "linear" if form is MATRIX else "pivoted"
    small, (report,) = go.run(model, f"low-rank{{rank=6,forms={name},solver=activation}}", calib=[(x,)])
    assert report.findings["layers"][0]["form"] == name and small.params["0.factors.0.weight"].dtype == dtype


def test_of_very_many_outputs_the_diagonal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4))
    x = torch.randn(20, 5)
    model = go.capture(net, (x,))
    layers = [whole for _, whole in find_layers(Rewriter(model)) if isinstance(whole, Whole)]
    complete = fisher(model, [(x,)], layers, 0)
    monkeypatch.setattr(_rank_fisher, "_WIDEST", 8)
    names = [whole.node.name for whole in layers]
    apart = fisher(model, [(x,)], layers, 0)
    assert apart[names[0]].shape == (1, 9) and apart[names[1]].shape == (1, 4, 4)
    torch.testing.assert_close(apart[names[0]], complete[names[0]].diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(apart[names[1]], complete[names[1]])
    assert all(parameter.grad is None for parameter in net.parameters())
    # The gradients at the outputs of the last layer are the random directions themselves: 1 or -1.
    torch.testing.assert_close(complete[names[1]].diagonal(dim1=1, dim2=2), torch.full((1, 4), 80.0).double())


@pytest.mark.parametrize("outputs", [6, 40])
def test_nothing_of_a_problem_stays(outputs: int) -> None:
    """What forms find out is used again, and gone with the problem."""
    problem = linear(6, outputs).problem()
    form = Pivoted(MATRIX) if outputs > 6 else MATRIX
    form.errors(problem, [(2,)])
    kept = list(problem.kept.values())
    MATRIX.factors(problem, (2,))
    assert list(problem.kept.values()) == kept and len(kept) == 1
    gone = weakref.ref(kept.pop())
    gc.disable()
    try:
        del problem
        assert gone() is None
    finally:
        gc.enable()
