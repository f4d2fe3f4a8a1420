"""From parameters to pipelines: every text can be read again, and the first ones are what they should be."""

from __future__ import annotations

import optuna
import pytest

from graphopt.pipeline import Pipeline
from graphopt.search.asked import parse_goals, parse_passes, usual_passes
from graphopt.search.proposals import baselines, gentle, proposed

WHERE = {"target": "cpu", "threads": "2"}


def study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))


def texts(number: int, passes: str | None = None, left_out: frozenset[str] = frozenset()) -> list[str]:
    asked = usual_passes() if passes is None else parse_passes(passes)
    made = study()
    return [proposed(made.ask(), asked, left_out, WHERE) for _ in range(number)]


def test_random_proposals_are_pipelines_with_one_budget_a_pass() -> None:
    found = texts(200)
    orders = set()
    for text in filter(None, found):
        steps = list(Pipeline.parse(text).passes())
        orders.add(tuple(step.name for step in steps))
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            given = [name for name in ("macs", "latency", "params", "experts") if getattr(step, name, None) is not None]
            assert len(given) == 1, str(step)
            if given == ["latency"]:
                assert step.threads == 2 and step.target == "cpu"  # type: ignore[attr-defined]
    assert {"prune-channels", "low-rank"} <= {name for order in orders for name in order}
    both = [order for order in orders if {"low-rank", "prune-channels"} <= set(order)]
    assert {order.index("low-rank") < order.index("prune-channels") for order in both} == {True, False}
    assert "" in found  # no pass at all, too


def test_ranges_and_fixed_values_are_kept_and_what_is_left_out_is_not_used() -> None:
    passes = "prune-channels{macs=0.3..0.4,step=8},low-rank{params=0.5}"
    for text in filter(None, texts(60, passes, frozenset({"low-rank"}))):
        (step,) = Pipeline.parse(text).passes()
        assert step.name == "prune-channels" and 0.3 <= step.macs <= 0.4 and step.step == 8  # type: ignore[attr-defined]
    assert any("low-rank{params=0.5" in text for text in texts(20, "low-rank{params=0.5}"))


def test_first_trials_are_each_pass_alone_at_the_goal_then_pairs() -> None:
    passes = parse_passes("prune-channels{macs=0.2..0.9},low-rank{latency=0.3..0.9},merge-experts")
    goals = parse_goals({"latency": 0.49})
    made = study()
    first = baselines(passes, goals, 4)
    for one in first:
        made.enqueue_trial(dict(one.params))
    found = [str(Pipeline.parse(proposed(made.ask(), passes, (), WHERE))) for _ in first]
    assert [one.alone for one in first] == ["merge-experts", "prune-channels", "low-rank", ""]
    assert found[0] == "merge-experts{experts=4}"
    assert found[1] == "prune-channels{macs=0.49,importance=taylor,step=16}"
    assert found[2] == "low-rank{latency=0.49,target=cpu,threads=2}"
    assert found[3] == "merge-experts{experts=4},prune-channels{macs=0.7,importance=taylor,step=16}"
    assert len(baselines(passes, goals, 0)) == 3 and len(baselines(passes, goals, 99)) == 6


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        ({"size": 0.4}, "low-rank{params=0.4}"),
        ({"latency": 0.4}, "low-rank{latency=0.4,target=cpu,threads=2}"),
        ({}, "low-rank{macs=0.5}"),
        ({"loss": 0.1}, "low-rank{macs=0.5}"),
    ],
)
def test_the_budget_is_that_of_the_goal(goal: dict[str, float], text: str) -> None:
    passes, made = parse_passes("low-rank"), study()
    made.enqueue_trial(dict(baselines(passes, parse_goals(goal), 1)[0].params))
    assert str(Pipeline.parse(proposed(made.ask(), passes, (), WHERE))) == text


def test_a_second_try_takes_away_little() -> None:
    passes, made = parse_passes("remove-layers"), study()
    made.enqueue_trial(dict(gentle(passes[0], passes).params))
    (step,) = Pipeline.parse(proposed(made.ask(), passes, (), WHERE)).passes()
    assert step.latency == 0.9  # type: ignore[attr-defined]
