"""Optimizers that bring units to zero: how many, which, that they stay, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.coupling import couple
from graphopt.errors import UsageError
from graphopt.train.dhspg import DHSPG
from graphopt.train.hesso import HESSO, HESSOCric, saliency
from graphopt.train.sparse import SparseOptimizer
from graphopt.train.units import Units
from tests.train.loop import batches, captured, equal, first_captured, producers, train

KINDS = (DHSPG, HESSO, HESSOCric)


def made(kind: type[SparseOptimizer], model: go.Model, sparsity: float = 0.5, **options: Any) -> SparseOptimizer:
    given = {"steps": 10, "start_step": 3, "momentum": 0.9, "weight_decay": 1e-3} | options
    return kind(model, 0.05, sparsity, **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_the_sparsity_is_met_and_zeros_stay(kind: type[SparseOptimizer], sparsity: float) -> None:
    model = captured()
    optimizer = made(kind, model, sparsity)
    train(model, optimizer, list(batches(60)))
    goal = int(20 * sparsity + 0.5)
    assert optimizer.finished and int(optimizer.zero.sum()) == goal
    assert torch.equal(optimizer.units.nonzeros() == 0, optimizer.zero)
    train(model, optimizer, list(batches(5, seed=1)))
    assert torch.equal(optimizer.units.nonzeros() == 0, optimizer.zero) and int(optimizer.zero.sum()) == goal
    with torch.no_grad():
        model.params["a.weight"].add_(1)
    optimizer.hold()
    assert torch.equal(optimizer.units.nonzeros() == 0, optimizer.zero)
    (chosen,) = {tuple(numbers) for name, numbers in optimizer.zeros().items() if name == "a"}
    assert all(not model.params[name][list(chosen)].any() for name in ("a.weight", "a.bias", "na.weight"))


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_sparsity_it_is_the_base_rule(kind: type[SparseOptimizer], rule: str) -> None:
    data = list(batches(20))
    options = {"momentum": 0.9, "weight_decay": 0.01} if rule == "sgd" else {"weight_decay": 0.01}
    ours, theirs = captured(), captured()
    optimizer = kind(ours, 0.01, 0.0, steps=10, rule=rule, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7)
    plain = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule](theirs.parameters(), lr=0.01, **options)
    other = torch.optim.lr_scheduler.StepLR(plain, 7)
    for batch in data:
        train(ours, optimizer, [batch])
        train(theirs, plain, [batch])
        schedule.step()
        other.step()
    assert equal(ours, theirs)


@pytest.mark.parametrize("stop", [2, 6, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(
    kind: type[SparseOptimizer], stop: int, tmp_path: Any
) -> None:
    data = list(batches(24))
    through, first, second = captured(), captured(), captured()
    whole = made(kind, through)
    train(through, whole, data)
    before = made(kind, first)
    train(first, before, data[:stop])
    torch.save({"model": first.module.state_dict(), "optimizer": before.state_dict()}, tmp_path / "state.pt")
    train(first, before, data[stop:])  # what is saved must not change with it
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    after = made(kind, second)
    second.module.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    train(second, after, data[stop:])
    assert equal(through, second) and torch.equal(whole.zero, after.zero)


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = captured()
    state = made(HESSO, model).state_dict()
    for other, message in ((made(DHSPG, model), "'kind'"), (made(HESSO, model, only=("a",)), "'units'")):
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(state)
    with pytest.raises(UsageError, match="'plan'"):
        made(HESSO, model, steps=11).load_state_dict(state)
    with pytest.raises(UsageError, match="nothing"):
        made(HESSO, model).load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


def test_trial_weights_are_put_back_exactly() -> None:
    model = captured()
    optimizer = made(HESSOCric, model, 0.4, start_step=0, samples=3, cycles=2)
    assert isinstance(optimizer, HESSOCric)
    before, moved = model.clone(), []
    for batch in batches(20):
        train(model, optimizer, [batch])
        if optimizer.shrunk:
            break
        changed = optimizer.units.nonzeros() != optimizer.units.sizes
        if optimizer.trial == 0:
            assert equal(model, before)
        elif optimizer.trial == 3:
            moved.append(changed)
            assert torch.equal(changed, optimizer.trying)  # the last point is zero
        else:
            assert not equal(model, before)
    assert len(moved) == optimizer.cycle == 2 and not bool((moved[0] & moved[1]).any())
    assert int(moved[0].sum()) == optimizer.quota.goal
    assert torch.equal(optimizer.counts, 3 + 3 * optimizer.tried)  # at full weights thrice, and on the way to zero


def test_only_chosen_units_are_penalised() -> None:
    model, plain = captured(), captured()
    optimizer = made(DHSPG, model, start_step=0, steps=50, penalty=0.1)
    for batch in batches(8):
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.data.copy_(ours)
        base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        named = dict(zip(model.parameters(), plain.parameters(), strict=True))
        for ours, theirs in named.items():
            base.state[theirs] = {k: v.clone() for k, v in optimizer.state.get(ours, {}).items() if v is not None}
        train(plain, base, [batch])
        train(model, optimizer, [batch])
        apart = optimizer.units.sums(lambda tensor, named=named: tensor != named[tensor])
        assert bool((apart[optimizer.chosen] > 0).all()) and not bool(apart[~optimizer.chosen].any())
    assert int(optimizer.chosen.sum()) == 10


@pytest.mark.parametrize(("amplify", "limit"), [(1.5, 50.0), (1e4, 1e9)])
def test_the_penalty_of_a_step(amplify: float, limit: float) -> None:
    """The second step of plain descent, with the strength computed by hand for each unit."""
    model = captured()
    optimizer = DHSPG(model, 0.1, 0.5, steps=100, penalty=1e-3, amplify=amplify, limit=limit)
    first, second = batches(2)
    train(model, optimizer, [first])  # with it the units are chosen
    before = {id(t): t.detach().clone() for t in optimizer.units.tensors}
    train(model, optimizer, [second])
    coupling, seen = couple(model), set()
    for span in optimizer.units.spans:
        for unit in range(span.size):
            if not optimizer.chosen[span.start + unit]:
                continue
            x, d, now = [], [], []
            for tensor, _, table in producers(coupling, coupling.group(span.name)):
                rows = np.flatnonzero(table[span.family] == unit)
                x.append(before[id(tensor)][rows].flatten())
                d.append(tensor.grad[rows].flatten())
                now.append(tensor.detach()[rows].flatten())
            x, d, now = torch.cat(x).double(), torch.cat(d).double(), torch.cat(now).double()
            slope, strength = float(x @ d), 1e-3
            if slope < 0:
                lowest, highest = -slope / float(x.norm()), -float(d @ d) * float(x.norm()) / slope
                strength = min(max(amplify * lowest, 1e-3), limit * 1e-3)
                seen.add("middle" if strength >= highest else "amplified")
                strength = (lowest + highest) / 2 if strength >= highest else strength
            else:
                seen.add("plain")
            wanted = x - 0.1 * (d + strength * x / x.norm())
            assert torch.allclose(now, wanted if wanted @ x > 0 else torch.zeros_like(x), rtol=1e-5, atol=1e-6)
    assert seen == {"plain", "middle" if amplify > 2 else "amplified"}


def test_a_unit_that_leaves_its_half_space_is_zero_for_good() -> None:
    """Where there is no gradient, a step takes rate times penalty from the norm of each chosen unit."""
    model = captured()
    norms = Units(couple(model), couple(model).groups.values()).norms()
    length = float(norms.median()) * 1.001
    optimizer = DHSPG(model, 1.0, 0.8, steps=100, penalty=length)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    crossed = optimizer.chosen & (norms <= length)
    assert torch.equal(optimizer.zero, crossed) and bool(crossed.any()) and not optimizer.finished
    left = torch.where(optimizer.chosen, norms - length, norms).clamp(min=0)
    assert torch.allclose(optimizer.units.norms(), left, atol=1e-5) and bool((optimizer.chosen & ~crossed).any())
    train(model, optimizer, list(batches(2)))
    assert not bool((optimizer.units.nonzeros() != 0)[crossed].any())


def test_shrinking_is_even() -> None:
    """With a rate of zero only the factors act: the chosen ones fall in equal steps."""
    model = captured()
    optimizer = HESSO(model, 0.0, 0.5, steps=4, periods=1)
    start, norms = optimizer.units.norms(), []
    for batch in batches(4):
        train(model, optimizer, [batch])
        norms.append(optimizer.units.norms() / start)
    for found, expected in zip(norms, (0.75, 0.5, 0.25, 0.0), strict=True):
        wanted = torch.where(optimizer.chosen, expected, 1.0)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_saliency_by_hand() -> None:
    model = captured()
    coupling = couple(model)
    units = Units(coupling, coupling.groups.values())
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), list(batches(1)))
    rows = []
    for span in units.spans:
        for unit in range(span.size):
            x, g = [], []
            for tensor, _, table in producers(coupling, coupling.group(span.name)):
                places = np.flatnonzero(table[span.family] == unit)
                x.append(tensor.detach()[places].flatten())
                g.append(tensor.grad[places].flatten())
            x, g = torch.cat(x), torch.cat(g)
            dot = x @ g
            cosine = F.cosine_similarity(x, -g, dim=0) + 1
            rows.append(torch.stack([x.norm(), x.norm() / x.numel(), cosine, dot.abs(), dot**2 / 2]))
    table = torch.stack(rows)
    assert torch.allclose(saliency(units), (0.2 * table / table.norm(dim=0)).sum(1), rtol=1e-4)


def test_what_is_chosen_stays_so() -> None:
    optimizer = made(HESSO, captured(), periods=2)
    optimizer.chosen[3:6] = True
    scores = torch.arange(optimizer.units.count, 0.0, -1)
    assert optimizer._choose(scores, 5).nonzero().flatten().tolist() == [3, 4, 5, 18, 19]


def test_widths_are_multiples() -> None:
    model = captured()
    optimizer = made(HESSO, model, 0.5, step=4)
    train(model, optimizer, list(batches(20)))
    left = {span.name: span.size - len(optimizer.zeros()[span.name]) for span in optimizer.units.spans}
    assert all(width % 4 == 0 for width in left.values()) and sum(left.values()) == 12


def test_named_groups_alone_become_zero() -> None:
    model = captured()
    optimizer = made(HESSO, model, 0.5, leave=("stem",))
    train(model, optimizer, list(batches(20)))
    assert len(optimizer.zeros()["a"]) == 6 and "stem" not in optimizer.zeros()


def test_whole_heads() -> None:
    model = captured("attention")
    optimizer = HESSO(model, 0.1, 0.5, steps=2, periods=1, only=("query",), families={"query": 0})
    for _ in range(2):
        optimizer.zero_grad()
        model.module(torch.randn(2, 7, 5)).square().mean().backward()
        optimizer.step()
    heads = model.params["query.weight"].detach().reshape(4, 6, 24).abs().sum((1, 2)) == 0
    assert heads.nonzero().flatten().tolist() == optimizer.zeros()["query"] and int(heads.sum()) == 2


def test_a_group_with_a_frozen_producer_is_left_out() -> None:
    model = captured()
    model.params["a.bias"].requires_grad_(False)
    assert set(made(HESSO, model).zeros()) == {"stem"}
    with pytest.raises(UsageError, match=r"'a\.bias' makes them"):
        made(HESSO, model, only=("a",))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.0, {}, "sparsity is 1"),
        (-0.1, {}, "sparsity is -0.1"),
        (0.5, {"only": ("sten",)}, "no group 'sten'"),
        (0.5, {"leave": ("b",)}, "no group 'b'"),
        (0.5, {"leave": ("stem", "a")}, "no group is left"),
        (0.5, {"families": {"a": 1}}, "no family 1"),
        (0.5, {"steps": 0}, "steps"),
        (0.5, {"start_step": -1}, "start_step -1"),
        (0.5, {"step": 0}, "step is 0"),
        (0.5, {"most": 0.0}, "most is 0"),
        (0.8, {"most": 0.5}, "only 10 may go"),
        (0.5, {"rule": "sgdd"}, "no base rule 'sgdd'"),
        (0.5, {"beta": 1}, "refuses its options"),
    ],
)
def test_bad_arguments(kind: type[SparseOptimizer], sparsity: float, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(kind, first_captured("residual"), sparsity, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (HESSO, {"periods": 0}),
        (HESSO, {"periods": 11}),
        (HESSOCric, {"samples": 0}),
        (HESSOCric, {"cycles": -1}),
        (DHSPG, {"epsilon": 1.0}),
        (DHSPG, {"penalty": 0.0}),
    ],
)
def test_bad_arguments_of_one_kind(kind: type[SparseOptimizer], options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        made(kind, first_captured("residual"), **options)
