"""What has to hold of a diff whatever the models: nothing for what is the same, exactly the edits for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt as go
from graphopt.diff import GraphDiff
from graphopt.model import Model
from tests.diff.consistent import assert_consistent, assert_mirrored
from tests.diff.disguise import disguised
from tests.diff.edits import edit, found
from tests.diff.nets import NETS, captured
from tests.random_nets import Net
from tests.strategies import nets

names = st.sampled_from(sorted(NETS))
seeds = st.integers(0, 10_000)
few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def both_ways(a: Model, b: Model) -> GraphDiff:
    """The diff, after everything that holds of every diff has been checked of it."""
    found, back = go.diff(a, b, cost=False), go.diff(b, a, cost=False)
    assert_consistent(found)
    assert_mirrored(found, back)
    return found


@pytest.mark.parametrize("name", NETS)
def test_a_model_is_itself(name: str, tmp_path: Path) -> None:
    model = captured(name)
    assert both_ways(model, model).same and both_ways(model, model.clone()).same
    for suffix in (".gopt", ".pt2"):
        model.save(tmp_path / f"net{suffix}")
        again = go.diff(model, tmp_path / f"net{suffix}")
        assert again.same and again.matched() == sum(1 for _ in again.a.view.calls()), again.summary()
        assert set(again.relations()) == {"equal"}


@pytest.mark.parametrize("name", NETS)
def test_a_second_capture_is_the_same_whatever_its_sizes_are_called(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(1)
    net = make().eval()
    first = go.capture(net, (torch.randn(shape),), dynamic={0: {0: "batch"}})
    second = go.capture(net, (torch.randn(shape),), dynamic={0: {0: "samples"}})
    assert both_ways(first, second).same
    fixed = both_ways(first, go.capture(net, (torch.randn(shape),)))
    assert not fixed.same, "a free size is another model than a fixed one"


@few
@given(names, seeds)
def test_names_and_order_do_not_matter(name: str, seed: int) -> None:
    model = captured(name)
    other = both_ways(model, disguised(model, seed))
    assert other.same and other.matched() == sum(1 for _ in other.a.view.calls()), other.summary()


@few
@given(nets(max_steps=10), seeds)
def test_random_nets_are_themselves_in_disguise(net: Net, seed: int) -> None:
    model = go.capture(net, net.args())
    assert both_ways(model, disguised(model, seed)).same


def expected(done: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted((kind, "" if kind == "pruned" else what) for kind, what in done)


def test_random_edits_are_found_exactly() -> None:
    """At least 95 of 100; the models are disguised half of the time, and trained a little in a quarter."""
    cases = [(name, seed) for name in sorted(NETS) for seed in range(20)]
    wrong = []
    for name, seed in cases:
        model = captured(name)
        other, done = edit(model, seed, 1 + seed % 6)
        result = go.diff(model, disguised(other, seed) if seed % 2 else other, cost=False)
        assert_consistent(result)
        if found(result) != expected(done):
            wrong.append((name, seed, done, result.entries))
    assert len(wrong) <= 0.05 * len(cases), wrong[0]


@few
@given(names, seeds, st.integers(1, 6))
def test_edits_are_mirrored(name: str, seed: int, count: int) -> None:
    model = captured(name)
    other, _ = edit(model, seed, count)
    both_ways(model, disguised(other, seed))


@few
@given(names, names, seeds)
def test_any_two_models_have_a_consistent_diff(first: str, second: str, seed: int) -> None:
    both_ways(captured(first), disguised(captured(second), seed))


@few
@given(nets(max_steps=8), nets(max_steps=8))
def test_any_two_random_nets_have_a_consistent_diff(first: Net, second: Net) -> None:
    both_ways(go.capture(first, first.args()), go.capture(second, second.args()))


@pytest.mark.parametrize("name", NETS)
def test_a_retrained_model_differs_in_weights_alone(name: str) -> None:
    model = captured(name)
    other = disguised(model, 3).clone()
    with torch.no_grad():
        for _, tensor in other.named_parameters():
            tensor.add_(torch.randn_like(tensor))
    trained = both_ways(model, other)
    assert {entry.kind for entry in trained.entries} == {"changed"}
    changes = [change for entry in trained.entries for pair in entry.pairs for change in pair.own]
    assert {change.kind for change in changes} == {"weight"}
    parameters = sum(1 for _ in model.named_parameters())
    assert len(changes) == parameters, "each parameter is told once"
    assert go.diff(model, other, weights=False, cost=False).same
    assert go.diff(model, other, ignore=["weights"], cost=False).same
