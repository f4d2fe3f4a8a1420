"""Forms of a factorised layer: what they compute, what they lose, what full rank gives back, what they refuse."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.passes._covariance import moments_of
from graphopt.passes._factor_folds import Folded
from graphopt.passes._factor_forms import Form, Rows
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._factor_pivots import Pivoted
from graphopt.passes._factor_problem import Problem
from graphopt.passes._factor_tensors import Polyadic, Tucker
from graphopt.passes._factor_trains import Train, TrainOfRows
from graphopt.passes._factor_writer import Aside, Inside
from graphopt.rewriter import Rewriter
from tests.compare import relative_error

WINDOW_FIRST, POINT_FIRST = Folded("kxk-1x1"), Folded("1x1-kxk", first=())
ROW_FIRST, COLUMN_FIRST = Folded("1xk-kx1", first=(1,)), Folded("kx1-1xk", first=(0,))
FOLDS = (WINDOW_FIRST, POINT_FIRST, ROW_FIRST, COLUMN_FIRST)
CONVOLVED: tuple[Form, ...] = (
    *FOLDS,
    Folded("grouped", parts=2),
    Folded("grouped", first=(), parts=2),
    Tucker(),
    Polyadic(),
    Pivoted(WINDOW_FIRST),
)
MATRIX = Folded("linear", matrix=True)
LINEAR: tuple[Form, ...] = (MATRIX, Train(), Train(cores=3), Pivoted(MATRIX))
TABLES: tuple[Form, ...] = (Rows(), TrainOfRows())


class Single:
    """A captured layer and data for it, all in float64, so that small errors can be measured."""

    def __init__(self, layer: nn.Module, x: Tensor, batches: int = 3) -> None:
        self.layer = layer.double().eval()
        self.batches = [(x,)] * 1 + [(x * 0.5 if x.is_floating_point() else x,)] * (batches - 1)
        self.model = go.capture(self.layer, (x,))
        self.rw = Rewriter(self.model.clone())
        ((_, whole),) = find_layers(self.rw)
        assert isinstance(whole, Whole), whole
        self.whole = whole

    def problem(self, solver: Any = "activation", *, data: bool = True) -> Problem:
        moments = None
        if data:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # few samples are what is tested
                ((_, found),) = moments_of(self.model, self.batches, {self.whole.node: self.whole_of_model()})
            moments = found.sum
        outer = None
        if solver == "fisher":
            each = self.whole.kernel.weight.shape[1] if self.whole.embedding else self.whole.kernel.outputs
            drawn = torch.randn(self.whole.groups, each // self.whole.groups, 3, dtype=torch.float64)
            outer = drawn @ drawn.transpose(1, 2)
        return Problem(self.whole, self.whole.dense(self.rw), solver, moments, outer)

    def whole_of_model(self) -> Whole:
        ((_, whole),) = find_layers(Rewriter(self.model))
        assert isinstance(whole, Whole)
        return whole

    def factorised(self, form: Form, factors: list[Tensor]) -> go.Model:
        rw = Rewriter(self.model.clone())
        ((_, whole),) = find_layers(rw)
        assert isinstance(whole, Whole)
        made = form.write(Inside(rw, whole), whole, factors)
        rw.replace(whole.node, made, "factorised")
        rw.model.touch()
        return rw.model

    def error(self, other: go.Model, problem: Problem | None = None) -> float:
        """Sum of squares by which the outputs differ on the data, as a problem weighs them."""
        with torch.no_grad():
            return sum(self._square(other(*b) - self.layer(*b), problem) for b in self.batches)

    def size(self, problem: Problem | None = None) -> float:
        with torch.no_grad():
            bias = getattr(self.layer, "bias", None)
            shift = 0 if bias is None else bias.reshape(-1, *[1] * (self.layer.weight.dim() - 2))
            return sum(self._square(self.layer(*b) - shift, problem) for b in self.batches)

    def _square(self, value: Tensor, problem: Problem | None) -> float:
        if problem is None or problem.roots is None:
            return float(value.square().sum())
        rows = value.movedim(1, -1) if self.whole.kernel.axes else value
        grouped = rows.unflatten(-1, (self.whole.groups, -1))
        return float(torch.einsum("gmn,...gn->...gm", problem.roots[0], grouped).square().sum())


@st.composite
def convolutions(draw: Any) -> Single:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    inputs, outputs = groups * draw(st.integers(1, 4)) * 2, groups * draw(st.integers(1, 5))
    axes = draw(st.sampled_from((2, 2, 1)))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    stride = [draw(st.integers(1, 2)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    padding = draw(st.one_of(st.just("same"), st.lists(st.integers(0, 2), min_size=axes, max_size=axes).map(tuple)))
    if padding == "same":
        stride = [1] * axes
    torch.manual_seed(draw(st.integers(0, 9)))
    made = (nn.Conv1d, nn.Conv2d)[axes - 1](
        inputs, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())
    )
    return Single(made, torch.randn(2, inputs, *(draw(st.integers(6, 9)) for _ in range(axes)), dtype=torch.float64))


def linear(inputs: int, outputs: int, rows: int = 40, *, bias: bool = True) -> Single:
    x = torch.randn(2, rows, inputs, dtype=torch.float64) * torch.logspace(0, -3, inputs, dtype=torch.float64)
    return Single(nn.Linear(inputs, outputs, bias=bias), x)


def ranks_of(form: Form, whole: Whole, part: float) -> tuple[int, ...]:
    most = whole.kernel.outputs // whole.groups - 1 if isinstance(form, Pivoted) else 10**6
    return tuple(min(most, max(1, round(part * full))) for full in form.full(whole))


def fits(single: Single, form: Form, solver: str) -> bool:
    return form.why_not(single.whole) is None and solver in form.solvers


def check(single: Single, form: Form, part: float, solver: Any) -> None:
    """The predicted error is the measured one, and the dense weight of the factors is what they compute."""
    problem, ranks = single.problem(solver), ranks_of(form, single.whole, part)
    factors = form.factors(problem, ranks)
    assert [f.shape for f in factors] == [f.shape for f in form.empty(single.whole, ranks)]
    (predicted,) = form.errors(problem, [ranks])
    made = single.factorised(form, factors)
    measured, size = single.error(made, problem), single.size(problem)
    assert predicted == pytest.approx(problem.error(form.dense(single.whole, factors)), rel=1e-6, abs=1e-9 * size)
    assert predicted == pytest.approx(measured, rel=1e-4, abs=1e-9 * size)
    assert problem.energy == pytest.approx(size, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    convolutions(),
    st.sampled_from(CONVOLVED),
    st.sampled_from((0.25, 0.5, 0.8)),
    st.sampled_from(("activation", "fisher", "svd", "semi-nmf", "random")),
)
def test_the_predicted_error_of_convolutions_is_the_measured_one(
    single: Single, form: Form, part: float, solver: str
) -> None:
    assume(fits(single, form, solver))
    check(single, form, part, solver)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from((4, 6, 8, 12)), st.sampled_from((4, 6, 8, 12, 24)), st.sampled_from(LINEAR),
    st.sampled_from((0.25, 0.5, 0.8)), st.sampled_from(("activation", "fisher", "svd", "semi-nmf", "random")),
    st.integers(1, 40),
)  # fmt: skip
def test_the_predicted_error_of_linear_layers_is_the_measured_one(
    i: int, o: int, form: Form, part: float, solver: str, rows: int
) -> None:
    single = linear(i, o, rows)
    assume(fits(single, form, solver))
    check(single, form, part, solver)


@pytest.mark.parametrize(
    ("form", "solver"), [(f, s) for f in TABLES for s in ("activation", "fisher", "svd", "random") if s in f.solvers]
)
@pytest.mark.parametrize("features", [4, 6])
def test_the_predicted_error_of_tables_is_the_measured_one(form: Form, features: int, solver: str) -> None:
    x = torch.randint(11, (3, 9)) * torch.randint(2, (3, 9))
    check(Single(nn.Embedding(11, features, padding_idx=0), x), form, 0.5, solver)


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from([form for form in CONVOLVED if not isinstance(form, Polyadic)]), st.booleans())
def test_full_rank_gives_a_convolution_back(single: Single, form: Form, data: bool) -> None:
    assume(form.why_not(single.whole) is None and not cannot_be_whole(single, form))
    gives_back(single, form, data)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("form", LINEAR)
def test_full_rank_gives_a_linear_layer_back(form: Form, data: bool) -> None:
    for sizes in ((8, 12), (12, 8)) if not isinstance(form, Pivoted) else ((8, 12),):
        gives_back(linear(*sizes, rows=3), form, data)  # three samples only: what they do not show has to stay as well


def cannot_be_whole(single: Single, form: Form) -> bool:
    """Whether no row is left that could be made from the others."""
    whole = single.whole
    return isinstance(form, Pivoted) and form.full(whole)[0] * whole.groups == whole.kernel.outputs


@pytest.mark.parametrize("form", TABLES)
def test_full_rank_gives_a_table_back(form: Form) -> None:
    gives_back(Single(nn.Embedding(11, 6), torch.randint(3, (2, 5))), form, data=True)


def gives_back(single: Single, form: Form, data: bool) -> None:
    problem = single.problem("activation" if data else "svd", data=data)
    factors = form.factors(problem, form.full(single.whole))
    other = (
        torch.randn_like(single.batches[0][0]) if single.batches[0][0].is_floating_point() else torch.arange(11)[None]
    )
    model = single.factorised(form, factors)
    with torch.no_grad():
        if other.is_floating_point():
            assert relative_error(model(other), single.layer(other)) < 1e-5
        assert relative_error(form.dense(single.whole, factors), problem.weight) < 1e-5


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(CONVOLVED), st.sampled_from((0.2, 0.4, 0.7)))
def test_knowing_the_data_is_never_worse(single: Single, form: Form, part: float) -> None:
    assume(form.why_not(single.whole) is None)
    ranks = ranks_of(form, single.whole, part)
    (aware,), (plain,) = (form.errors(single.problem(solver), [ranks]) for solver in ("activation", "svd"))
    assert aware <= plain * (1 + 1e-6) + 1e-9 * single.size()


def field_example() -> Single:
    """12 x 16 on data whose directions fall from 1 to 1e-3, each of them a mixture of all inputs."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(1, 512, 16, generator=generator, dtype=torch.float64)
    single = Single(nn.Linear(16, 12, bias=False), (x * torch.logspace(2, -1, 16, dtype=torch.float64)) @ mixed, 1)
    with torch.no_grad():
        single.layer.weight.copy_(torch.randn(12, 16, generator=generator, dtype=torch.float64))
    return Single(single.layer, single.batches[0][0], 1)


def test_an_ill_conditioned_input() -> None:
    """At rank 4 the error is at least three times less than that of plain SVD, and what whitening by Cholesky gives:
    measured, predicted and the tail of the whitened weight are one number (11.12 in the field's example, to 44.66)."""
    single = field_example()
    problem, plain = single.problem(), single.problem("svd")
    assert problem.moments is not None
    whitened = problem.weight @ torch.linalg.cholesky(problem.moments[0])
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)
    cholesky = torch.linalg.solve_triangular(
        torch.linalg.cholesky(problem.moments[0]).T, ((u[:, :4] * s[:4]) @ v[:4]).T, upper=True
    ).T
    errors = {}
    for form in (MATRIX, Pivoted(MATRIX)):
        for one in (problem, plain):
            made = single.factorised(form, form.factors(one, (4,)))
            errors[form.name, one.solver] = single.error(made) ** 0.5
            assert form.errors(one, [(4,)])[0] ** 0.5 == pytest.approx(errors[form.name, one.solver], rel=1e-6)
    tail = float(s[4:].square().sum().sqrt())
    assert errors["linear", "activation"] == pytest.approx(tail, rel=1e-8)
    assert errors["pivoted", "activation"] == pytest.approx(tail, rel=1e-6)
    assert problem.error(cholesky) ** 0.5 == pytest.approx(tail, rel=1e-6)
    assert errors["linear", "svd"] > 3 * tail


def test_a_singular_covariance_is_no_trouble() -> None:
    x = torch.randn(4, 5, 1, dtype=torch.float64).expand(4, 5, 6).contiguous()
    for form in (MATRIX, Train()):
        single = Single(nn.Linear(6, 8), x)
        factors = form.factors(single.problem(), (1,) if form is MATRIX else form.full(single.whole))
        assert single.error(single.factorised(form, factors)) < 1e-9 * single.size()


# Costs


def cost_of(single: Single, form: Form, ranks: tuple[int, ...]) -> tuple[float, int]:
    aside = Aside(single.rw, single.whole)
    form.write(aside, single.whole, form.empty(single.whole, ranks))
    return aside.macs, aside.parameters


def test_true_break_even_ranks() -> None:
    def largest(form: Form, single: Single, whole: float) -> int:
        full = form.full(single.whole)[0]
        return max((r for r in range(1, full + 1) if cost_of(single, form, (r,))[0] < whole), default=0)

    # conv 64 to 64, 3 x 3, on 16 x 16: 64 * 576 = r * (576 + 64) with r = 57.6.
    single = Single(nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16, dtype=torch.float64))
    macs = 64 * 64 * 9 * 256
    assert [largest(form, single, macs) for form in FOLDS] == [57, 57, 95, 95]
    assert cost_of(single, WINDOW_FIRST, (57,)) == (57 * 640 * 256, 57 * 640)
    # With a stride the first layer of 1x1, then 3x3 runs at four times as many positions.
    single = Single(nn.Conv2d(64, 64, 3, stride=2, padding=1), torch.randn(1, 64, 16, 16, dtype=torch.float64))
    assert cost_of(single, POINT_FIRST, (10,)) == (10 * 64 * 256 + 10 * 576 * 64, 10 * 640)
    assert cost_of(single, ROW_FIRST, (10,)) == (10 * 192 * 128 + 10 * 192 * 64, 10 * 384)
    assert [largest(form, single, macs / 4) for form in FOLDS] == [57, 44, 63, 63]


@pytest.mark.parametrize(("layer", "x", "why"), [
    (nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5), {"tucker": "it is in 2 groups", "cp": "it is in 2 groups"}),
    (nn.Conv2d(4, 4, 1), torch.randn(1, 4, 5, 5), {"1x1-kxk": "one tap", "1xk-kx1": "one tap", "tucker": "one tap"}),
    (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5), {"grouped": "3 inputs do not make 2", "tt": "no linear"}),
    (nn.Linear(7, 6), torch.randn(1, 7), {"tt": "7 is no product", "tucker": "no conv", "embedding": "no emb"}),
])  # fmt: skip
def test_what_does_not_fit_is_refused(layer: nn.Module, x: Tensor, why: dict[str, str]) -> None:
    single = Single(layer, x.double())
    refused = {f.name: f.why_not(single.whole) for f in (*CONVOLVED, Train(), Rows())}
    for name, reason in why.items():
        assert reason in (refused[name] or ""), refused
