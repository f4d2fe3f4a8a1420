"""Units as slices of parameters, which of them are chosen, and the penalty that parts them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt as go
from graphopt.analysis.coupling import Coupling, Group, couple
from graphopt.train.choice import Quota
from graphopt.train.group_sl import GroupSL
from graphopt.train.units import Units, _layout
from tests.coupling.between import Read
from tests.random_nets import Net
from tests.strategies import nets as random_nets
from tests.train.loop import batches, captured, producers, train


def naive(coupling: Coupling, group: Group, family: int, unit: int) -> list[Tensor]:
    """Every element that makes a unit, found one position at a time."""
    elements = []
    for tensor, axis, table in producers(coupling, group):
        positions = table[family]
        if positions.ndim == 1:
            elements += [tensor.select(axis, i).flatten() for i in np.flatnonzero(positions == unit)]
            continue
        groups = len(positions)
        for number, part in enumerate(tensor.chunk(groups, 1 - axis)):
            elements += [part.select(axis, i).flatten() for i in np.flatnonzero(positions[number] == unit)]
    return elements


def check_units(model: go.Model) -> int:
    coupling, count = couple(model), 0
    for family in (0, 1):
        groups = [group for group in coupling.groups.values() if family < len(group.families)]
        units = Units(coupling, groups, families={group.name: family for group in groups})
        norms, sizes = units.norms(), units.sizes
        for group, span in zip(groups, units.spans, strict=True):
            assert span.size == len(group.families[family])
            for unit in range(span.size):
                elements = naive(coupling, group, family, unit)
                flat = torch.cat(elements) if elements else torch.zeros(0)
                assert int(sizes[span.start + unit]) == flat.numel()
                assert torch.allclose(norms[span.start + unit].double(), flat.double().norm(), rtol=1e-5, atol=1e-12)
                count += 1
    return count


@pytest.mark.parametrize("name", ["grouped", "transposed", "tied", "bias_table", "stack", "gated", "weight_first"])
def test_norms_are_those_of_a_loop(name: str) -> None:
    assert check_units(captured(name)) >= 4


def test_groups_that_share_positions() -> None:
    """A weight [4, 3] whose two groups of rows share the columns, and the same stored the other way round."""
    unit, weight = np.array([[0, 1, 2], [2, 1, -1]]), torch.zeros(4, 3)
    wide = [[0, 1, 2], [0, 1, 2], [2, 1, -1], [2, 1, -1]]
    assert _layout(unit, 1, weight).tolist() == wide
    assert _layout(unit, 0, weight.t()).tolist() == np.transpose(wide).tolist()


def test_norms_are_those_of_a_loop_on_random_nets() -> None:
    seen = []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(random_nets(), st.booleans())
    def check(net: Net, along_last: bool) -> None:
        seen.append(check_units(go.capture(Read(net, along_last).eval(), net.args(2))))

    check()
    assert sum(seen) > 50


def test_zeroed_units_are_zero_and_the_rest_is_as_it_was() -> None:
    model = captured("grouped")
    coupling = couple(model)
    units = Units(coupling, coupling.groups.values())
    before, chosen = model.clone(), torch.arange(units.count) % 2 == 0
    units.zero(chosen)
    assert torch.equal(units.nonzeros() == 0, chosen)
    changed = sum(int((p != q).sum()) for p, q in zip(before.parameters(), model.parameters(), strict=True))
    assert changed == int(units.sizes[chosen].sum())


def test_group_sparsity_penalty() -> None:
    model = captured()
    penalty = GroupSL(model, 0.1, alpha=4.0)
    weights, importance = penalty.weights(), penalty.units.sums(torch.square)
    for span in penalty.units.spans:
        mine, sizes = weights[span.start : span.stop], importance[span.start : span.stop]
        assert float(mine[sizes.argmin()]) == 16 and float(mine[sizes.argmax()]) == 1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_gradients()
    w, readers = model.params["a.weight"], model.params["b.weight"]
    a = next(span for span in penalty.units.spans if span.name == "a")
    stem = next(span for span in penalty.units.spans if span.name == "stem")
    own, fed = weights[a.start : a.stop], weights[stem.start : stem.stop]
    assert torch.allclose(w.grad, 0.1 * w * (own[:, None, None, None] + fed[None, :, None, None]))
    assert torch.allclose(readers.grad, 0.1 * readers * (fed[:, None, None, None] + own[None, :, None, None]))


def test_the_penalty_parts_units() -> None:
    spread = {}
    for strength in (0.0, 0.02):
        model = captured()
        penalty = GroupSL(model, strength)
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), list(batches(30)), penalty.add_gradients)
        importance = penalty.units.sums(torch.square)
        spread[strength] = float(importance.max() / importance.min())
    assert spread[0.02] > 2 * spread[0.0], spread


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 20), st.integers(1, 5), st.floats(0.3, 1.0), st.integers(0, 999))
def test_the_lowest_are_chosen(count: int, step: int, most: float, seed: int) -> None:
    units = some_units()
    quota = Quota(units, 0.0, step, most)
    scores = torch.rand(units.count, generator=torch.Generator().manual_seed(seed))
    mask, total, full = quota.lowest(scores, count), 0, True
    for span in units.spans:
        mine, values = mask[span.start : span.stop], scores[span.start : span.stop]
        lost = int(mine.sum())
        total += lost
        assert lost <= min(span.size - 1, most * span.size + 1e-6)
        assert not lost or span.size < 2 * step or (span.size - lost) % step == 0
        assert not lost or float(values[mine].max()) <= float(values[~mine].min())
        left = min(span.size - 1, int(most * span.size + 1e-9)) - lost
        full = full and left < (step if span.size >= 2 * step else 1)
    assert total <= count and (full or total > count - step)
    if step == 1 and not full:
        assert total == count


@cache
def some_units() -> Units:
    coupling = couple(captured())
    return Units(coupling, coupling.groups.values())
