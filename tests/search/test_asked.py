"""Goals and passes as the user writes them, and what passes declare."""

from __future__ import annotations

import pytest

from graphopt.errors import UsageError
from graphopt.registry import get_pass, pass_names
from graphopt.search.asked import describe, parse_goals, parse_passes, usual_passes
from graphopt.space import Choices, Range
from graphopt.transform import parse_value


def test_what_passes_declare_are_options_and_values_of_theirs() -> None:
    declared = [cls for name in pass_names() if (cls := get_pass(name)).space is not None]
    assert {cls.name for cls in declared} >= {"prune-channels", "low-rank", "merge-layers", "remove-layers"}
    for cls in declared:
        assert cls.space is not None and 0 <= cls.space.place <= 1
        for name, values in (*cls.space.budgets.items(), *cls.space.options.items()):
            kind = cls.options()[name].type
            for text in values.values if isinstance(values, Choices) else (values.text(values.low), values.text(9e9)):
                parse_value(text, kind)
            assert isinstance(values, Choices) or values.low < values.high
    assert all(cls.contract.name == "lossy" for cls in declared)


def test_usual_passes_are_in_their_usual_order() -> None:
    names = [one.name for one in usual_passes()]
    assert names.index("remove-layers") < names.index("prune-channels") < names.index("low-rank")


def test_values_are_fixed_tried_or_left_to_the_pass() -> None:
    rank, prune = sorted(
        parse_passes("low-rank,prune-channels{macs=0.3..0.9,importance=taylor|fisher,step=8}"), key=str
    )
    assert (prune.fixed, prune.budgets) == ({"step": "8"}, {"macs": Range(0.3, 0.9)})
    assert prune.options == {"importance": Choices.of("taylor", "fisher"), "branches": Choices.of("false", "true")}
    declared = get_pass("low-rank").space
    assert declared is not None and rank.budgets == declared.budgets and not rank.fixed
    (fixed,) = parse_passes("prune-channels{macs=0.5,importance=taylor,branches=false,step=8}")
    assert not fixed.budgets and not fixed.options and fixed.aimed_at(parse_goals({"latency": 0.4})) is None


def test_any_pass_takes_part_where_it_is_named_and_only_numbers_have_ranges() -> None:
    (one,) = parse_passes("project-utilized")
    assert not one.budgets and not one.options
    (experts,) = parse_passes("merge-experts{experts=2..6}")
    assert experts.budgets == {"experts": Range(2, 6, whole=True)}
    assert describe([experts]) == "merge-experts{experts=2..6}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prune-chanels,low-rank{makcs=1}", ["'prune-chanels'", "mean prune-channels", "no option 'makcs'", "macs"]),
        ("prune-channels{macs=much}", ["option 'macs' of 'prune-channels'", "not 'much'"]),
        ("prune-channels{macs=0.9..0.3}", ["not '0.9..0.3'"]),
        ("prune-channels{importance=taylor..fisher}", ["not 'taylor..fisher'"]),
        ("prune-channels{importance=taylor|tailor}", ["not 'taylor|tailor'"]),
        ("low-rank,low-rank", ["'low-rank' is listed twice"]),
        ("exact", ["it is a preset"]),
        ("remove-channels", ["'remove-channels' needs the option 'layer'", "'indices'"]),
        ("low-rank,", ["cannot be read"]),
        ("low-rank{macs=0.5", ["cannot be read"]),
        ("", ["cannot be read"]),
    ],
)  # fmt: skip
def test_wrong_passes_are_all_named(text: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_passes(text)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_goals_leave_one_objective_or_all() -> None:
    assert parse_goals({"latency": 0.5}).objectives == ("loss",)
    assert parse_goals({"latency": 0.5, "loss": 0.1}).objectives == ("size",)
    assert parse_goals({"loss": 2.0}).objectives == ("latency",)
    assert parse_goals({}).objectives == ("latency", "size", "loss")
    excess = parse_goals({"latency": 0.5}).excess({"latency": 0.6, "size": 1.0, "loss": 9.0})
    assert excess == {"latency": pytest.approx(0.2)}


@pytest.mark.parametrize(
    ("goals", "part"),
    [
        ({"latencies": 0.5}, "did you mean latency"),
        ({"latency": 1.5}, "latency=1.5 is none"),
        ({"loss": 0.0}, "loss=0 is none"),
        ({"size": float("nan")}, "size=nan is none"),
        ({"latency": 0.5, "size": 0.5, "loss": 0.5}, "nothing is left"),
    ],
)
def test_wrong_goals(goals: dict[str, float], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_goals(goals)
