"""Low-rank substitution: layers become several cheaper ones, to a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.errors import UsageError
from graphopt.measure import Stopwatch
from graphopt.names import nearest
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.passes._factor_problem import AWARE, SOLVERS, Solver
from graphopt.passes._factor_refit import refit
from graphopt.passes._low_rank_plan import ALLOCATIONS, Allocation, Asked, choose
from graphopt.passes._output_error import OutputError
from graphopt.passes._rank_choice import Chosen
from graphopt.passes._rank_fisher import fisher
from graphopt.passes._rank_options import FORMS, Made, Option, Problems, substitute
from graphopt.rewriter import Node, Rewriter
from graphopt.space import Choices, Range, Space
from graphopt.target import Target
from graphopt.transform import Contract, Pass

__all__ = ["LowRank"]

_PARTS = ("params", "macs", "latency", "energy", "rank")


@dataclass(frozen=True)
class LowRank(Pass):
    """Put cheaper factors in the place of layers, with ranks that are chosen together under one budget.

    What:
        A linear layer becomes two, through fewer features; a convolution becomes two that slide along different axes,
        or three or four by the decompositions of tensors; an embedding becomes a narrower one and a linear layer. Every
        rank is chosen by what it loses on calibration data and by what it costs. The result is an ordinary model.

    Algebra:
        W [out, in * taps] = A [out, r] B [r, in * taps], for which the sum of |W x - A B x|^2 over the data is the tail
        sum over i > r of the eigenvalues of W C W^T, C = sum x x^T: B = U^T W and A = U, with U [out, r] the leading
        eigenvectors. No inverse is taken, so that C may be singular. Without data C is the identity. Of r rows of A B
        the others are combinations (`pivoted`): r (out + in * taps - r) numbers are enough. Other foldings
        take B in this measure as well, then A as the least squares of the outputs on what B makes. Choose ranks:
        minimise the sum over layers of s * tail / |W x|^2 subject to sum of costs <= budget, with s by how much an
        error there changes the model's outputs.

    When it applies:
        To linear layers, products with a stored matrix, convolutions with one to three axes and embeddings; a grouped
        convolution group by group. Left alone, each with the reason: weights that are shared or tied (both sides would
        have to change), masked or computed; transposed convolutions; what is a factor already; layers for which no
        form is cheaper.
        Options: one budget: `params`, `macs` or `latency`, the part to keep; `energy`, the part of what every layer
        makes that has to be kept; `rank`, a number, or a part of each layer's full one. With a `target`, which a
        latency has in any case (`cpu`), a substitution that is not faster there, measured with `threads` threads, is
        not made. `forms`: `linear`, `kxk-1x1`, `1xk-kx1`, `kx1-1xk`, `1x1-kxk`, `grouped`, `tucker`, `cp`, `tt`,
        `embedding`, `pivoted`. `solver`: by default `svd` without calibration data, else `fisher`, which weighs
        errors by gradients of the model's outputs, and `activation` for an energy or a rank; `semi-nmf`, `random`.
        `allocation`: `solve`, `minimax` (the largest relative error of a layer is made small), `alds` (the same on
        singular values, with foldings and groups chosen too). `step`, of which ranks are multiples (for a latency as
        many as a vector holds, else 1); `only` and `leave`, names of layers or of modules that they are in;
        `refit`, whether factors are fitted to what they get then (with `fisher` and `activation` by default); `seed`.

    Safety:
        Lossy: train the result (`graphopt.train.finetune`). Refitting is kept only if it brings the outputs nearer on
        the calibration data. Values and weights that are not finite are refused, too few samples are warned about.

    Cost:
        Two runs over the calibration data, moments of n x n numbers for a layer that reads n, of a few layers at a
        time; for every layer an eigendecomposition for each form, and a run to see what its errors do. Refitting takes
        two runs for each layer. A latency needs compilations: of every layer and factor never measured on such a
        target, and of the model for every plan that is tried.

    Source:
        Eckart and Young, 1936; Yu and Wu, Compressing Transformers: Features Are Low-Rank, but Weights Are Not!, AAAI
        2023, for outputs in the place of weights; Liebenwein et al., Compressing Neural Networks: Towards Determining
        the Optimal Layer-wise Decomposition, NeurIPS 2021 (ALDS), for foldings and `alds`.

    Example:
        >>> import torch, graphopt
        >>> linear, tanh = torch.nn.Linear, torch.nn.Tanh()
        >>> net = torch.nn.Sequential(linear(32, 64), tanh, linear(64, 64), tanh, linear(64, 8)).eval()
        >>> x = torch.randn(256, 4) @ torch.randn(4, 32)
        >>> model = graphopt.capture(net, (x,))
        >>> small, (report,) = graphopt.run(model, "low-rank{params=0.5}", calib=[(x,)])
        >>> report.cost_after.parameters <= 0.5 * report.cost_before.parameters
        True
        >>> report.findings["output error"]["refitted"] < 0.2
        True
    """

    name: ClassVar[str] = "low-rank"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")
    space: ClassVar[Space | None] = Space(
        budgets={"macs": Range(0.3, 0.95), "latency": Range(0.3, 0.95), "params": Range(0.3, 0.95)},
        options={"allocation": Choices.of("solve", "minimax")},
        place=0.8,
    )

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    energy: float | None = None
    rank: float | None = None
    target: str | None = None
    threads: int | None = None
    forms: tuple[str, ...] = ("linear", "kxk-1x1", "1xk-kx1", "kx1-1xk", "1x1-kxk", "pivoted")
    solver: Solver | None = None
    allocation: Allocation = "solve"
    step: int | None = None
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    refit: bool | None = None
    seed: int = 0

    def run(self, rw: Rewriter) -> None:
        asked = self._asked(rw)
        original = rw.model.clone(share_tensors=True)
        layers = self._layers(rw, original)
        outer = fisher(original, rw.calib, layers, self.seed) if asked.solver == "fisher" else {}
        problems = Problems(original, rw.calib, asked.solver, outer, self.seed)
        rw.findings |= {"budget": {asked.budget: asked.value}, "solver": asked.solver, "allocation": asked.allocation}
        chosen = choose(rw, asked, problems, layers)
        taken = [whole for whole in layers if chosen[whole.node.name].form is not None]
        rw.findings["layers"] = [_row(whole, chosen[whole.node.name]) for whole in taken]
        made = _put_in(rw, problems, taken, chosen)
        if rw.calib and made:
            if asked.solver in AWARE and self.refit is not False:
                refit(rw, problems, made)
            else:
                rw.findings["output error"] = {"factorised": OutputError(original, rw.calib).of(rw.model)}

    def _asked(self, rw: Rewriter) -> Asked:
        """The options, checked.

        Raises:
            UsageError: for what cannot be asked, alone or together.
        """
        given = {name: value for name in _PARTS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UsageError(
                "it needs one budget",
                todo="give params=0.5, macs=0.5 or latency=0.5, the part to keep, or energy=0.99, or rank=16",
            )
        ((budget, value),) = given.items()
        _check_value(budget, value)
        unknown = [name for name in self.forms if name not in FORMS]
        if unknown or not self.forms:
            raise UsageError(f"there is no form '{', '.join(unknown)}'", todo=nearest(", ".join(unknown), FORMS))
        solver = self.solver or self._usual_solver(rw, budget)
        self._check_choices(rw, solver, budget)
        target = self.target or ("cpu" if budget == "latency" else None)
        watch = None if target is None else Stopwatch(Target.parse(target), self.threads)
        forms = tuple(form for name in self.forms for form in FORMS[name])
        step = self.step or (max(1, watch.target.vector_bits // 32) if watch and budget == "latency" else 1)
        return Asked(budget, value, forms, solver, self.allocation, step, watch, self.seed)

    def _usual_solver(self, rw: Rewriter, budget: str) -> Solver:
        """Energies and ranks are of what layers make; a budget for all is spent by what arrives at the outputs."""
        if not rw.calib or self.allocation == "alds":
            return "svd"
        return "activation" if budget in ("energy", "rank") else "fisher"

    def _check_choices(self, rw: Rewriter, solver: Solver, budget: str) -> None:
        for option, name, known in (("solver", solver, SOLVERS), ("allocation", self.allocation, ALLOCATIONS)):
            if name not in known:
                raise UsageError(f"there is no {option} '{name}'", todo=nearest(name, known))
        if self.step is not None and self.step < 1:
            raise UsageError(f"step is {self.step}, it has to be at least 1")
        if self.allocation != "solve" and budget in ("energy", "rank"):
            raise UsageError(f"with {budget} there is nothing to allocate", todo="leave `allocation` out")
        if self.allocation == "alds" and (budget == "latency" or self.target is not None):
            raise UsageError("ALDS counts parameters or multiply-accumulates", todo="give params= or macs=, no target")
        if not rw.calib and (self.refit or solver in ("activation", "fisher")):
            needs = "refit" if self.refit else f"the solver '{solver}'"
            raise UsageError(
                f"{needs} needs calibration data",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        if rw.model.mode == "train":
            raise UsageError("layers are factorised in evaluation mode", todo="call eval() on the model first")

    def _layers(self, rw: Rewriter, original: Any) -> list[Whole]:
        """Those of the original that may be factorised; the others are noted with their reasons."""
        found = list(find_layers(Rewriter(original)))
        known = [whole for _, whole in found if isinstance(whole, Whole)]
        for name in (*self.only, *self.leave):
            if not any(whole.is_in([name]) for whole in known):
                todo = nearest(name, {whole.name for whole in known})
                raise UsageError(f"no layer that could be factorised is called '{name}'", todo=todo)
        layers = []
        for node, whole in found:
            if isinstance(whole, str):
                rw.skip(node, whole)
            elif (not self.only or whole.is_in(self.only)) and not whole.is_in(self.leave):
                layers.append(whole)
        return layers


def _check_value(budget: str, value: float) -> None:
    if budget == "rank":
        if not value > 0 or not math.isfinite(value) or (value >= 1 and value != int(value)):
            raise UsageError(f"rank is {value:g}, it has to be a whole number from 1 on, or a part between 0 and 1")
    elif not 0 < value < 1:
        raise UsageError(f"{budget} is {value:g}, it has to be between 0 and 1")


def _put_in(rw: Rewriter, problems: Problems, taken: list[Whole], chosen: Chosen) -> dict[Whole, tuple[Option, Made]]:
    """Replace layers; by those of the original, in order, what was put in their places."""
    made: dict[Node, tuple[Option, Made]] = {}
    for problem in problems.of(taken):
        option = chosen[problem.whole.node.name]
        assert option.form is not None
        factors = option.form.factors(problem, option.ranks)
        made[problem.whole.node] = option, substitute(rw, problem.whole.onto(rw), option, factors)
        del problem, factors  # before the numbers of the next one are there
    rw.model.touch()
    return {whole: made[whole.node] for whole in taken}


def _row(whole: Whole, option: Option) -> dict[str, Any]:
    assert option.form is not None
    full = option.form.full(whole)
    return {
        "layer": whole.name,
        "form": option.form.name,
        "rank": list(option.ranks),
        "of": list(full),
        "error": math.sqrt(option.error),
        "cost": option.cost,
    }
