"""The search itself, with counted latencies: what it tries, what it records, what it gives out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt as go
from graphopt.errors import UsageError
from graphopt.passes import low_rank
from graphopt.passes._output_error import OutputError
from graphopt.search import GoalMissed, Result, Trial, frontier
from graphopt.search.judge import Found, Judge, Refused, agreed
from tests.search.nets import PASSES, CountedLatency, batches, model

pytestmark = [pytest.mark.usefixtures("counted"), pytest.mark.filterwarnings("ignore:.*reads .* numbers")]


def searched(**options: Any) -> Result:
    given = {"calib": batches(), "valid": batches(2), "passes": PASSES, "backend": "reference", "trials": 12}
    return go.search(model(), **{**given, **options})


def test_best_keeps_the_goal_is_as_good_as_each_pass_alone_and_comes_again_from_its_text() -> None:
    result = searched(goals={"latency": 0.5}, trials=12)
    best, verified = result.best, result.verified
    assert best is not None and verified is not None and result.model is not None
    assert len(result.trials) == 12 and result.stopped == "all trials are done" and not result.rejected
    assert [trial.pipeline for trial in result.trials[:2]] == [
        "prune-channels{macs=0.5,importance=taylor,step=4}", "low-rank{macs=0.5}"
    ]  # fmt: skip
    alone = [trial for trial in result.trials if trial.alone]
    assert [trial.alone for trial in alone] == ["prune-channels", "low-rank"]
    assert best.measure("latency") <= 0.5
    assert all(best.measure("loss") <= one.measure("loss") for one in alone if one.measure("latency") <= 0.5)
    assert verified.to_json() == pytest.approx(best.found.to_json())  # type: ignore[union-attr]
    original = model()
    small, _ = go.run(original, best.pipeline, calib=batches())
    assert OutputError(original, batches(2)).of(small) == pytest.approx(best.measure("loss"), rel=1e-6)
    assert str(small) == str(result.model) and result.model.history == small.history


def test_same_seed_tries_the_same_and_nothing_twice() -> None:
    one, two, other = (searched(seed=seed, trials=number) for seed, number in ((0, 9), (0, 9), (1, 4)))
    texts = [trial.pipeline for trial in one.trials]
    assert one.trials == tuple(_timeless(trial, like) for trial, like in zip(two.trials, one.trials, strict=True))
    assert len(set(texts)) == len(texts) == 9
    assert texts[:2] == [trial.pipeline for trial in other.trials[:2]] and texts[3] != other.trials[3].pipeline


def _timeless(trial: Trial, like: Trial) -> Trial:
    return Trial(**{**vars(trial), "number": like.number, "seconds": like.seconds})


def test_without_a_goal_the_frontier_is_kept_and_nothing_is_chosen() -> None:
    result = searched(trials=10)
    assert result.best is None and result.model is None
    front = result.frontier
    numbers = {trial.number for trial in front}
    for trial in result.complete:
        beaten = [
            one
            for one in front
            if one is not trial
            and all(one.measure(name) <= trial.measure(name) for name in ("latency", "size", "loss"))
        ]
        assert bool(beaten) != (trial.number in numbers), trial
    assert [one.measure("latency") for one in front] == sorted(one.measure("latency") for one in front)


def test_what_cannot_be_combined_is_pruned_with_the_reason() -> None:
    result = searched(passes="prune-channels{macs=0.5..0.9,step=1,importance=magnitude|taylor,branches=true}", trials=6)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned and all("importance=magnitude" in trial.pipeline for trial in pruned)
    assert all("branches need calibration data and importance=taylor" in (one.reason or "") for one in pruned)
    assert result.complete and all("taylor" in trial.pipeline for trial in result.complete)


def test_a_pass_that_breaks_is_a_reason_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(low_rank, "choose", broken)
    result = searched(trials=6, goals={"latency": 0.6})
    assert "low-rank" in result.left_out and "ZeroDivisionError: a bug" in result.left_out["low-rank"]
    tries = ["low-rank{macs=0.6}", "low-rank{macs=0.9}"]  # at the goal, gently, and not any more
    assert [one.pipeline for one in result.trials if one.alone == "low-rank"] == tries
    assert result.best is not None and "low-rank" not in result.best.pipeline


def test_a_pass_that_changes_nothing_is_left_out_and_a_search_with_nothing_else_ends() -> None:
    with pytest.raises(GoalMissed, match="none of 1 trials has a result") as caught:
        searched(passes="merge-experts", goals={"latency": 0.5})
    result = caught.value.result
    assert result.left_out == {"merge-experts": "'merge-experts' changes nothing"}
    assert result.stopped == "no pass can do anything for this model" and caught.value.exit_code == 1


def test_a_missed_goal_says_what_was_nearest() -> None:
    with pytest.raises(GoalMissed) as caught:
        searched(
            passes="prune-channels{macs=0.7..0.9,importance=taylor,branches=false}", goals={"latency": 0.3}, trials=4
        )
    nearest = min(caught.value.result.complete, key=lambda one: one.measure("latency"))
    assert "latency=0.3 was reached by none of 4 pipelines" in str(caught.value)
    assert nearest.pipeline in str(caught.value) and f"trial {nearest.number}" in str(caught.value)


def test_a_space_of_few_pipelines_comes_to_an_end() -> None:
    result = searched(passes="low-rank{macs=0.5,allocation=solve|minimax}", trials=30)
    assert len(result.trials) == 2 and result.stopped == "nothing new came in 40 proposals"


def test_own_loss_and_time() -> None:
    result = searched(evaluate=_parameters, goals={"latency": 0.6}, trials=50, seconds=0.2)
    assert result.stopped == "the time is over" and 1 <= len(result.trials) < 50
    assert result.best is not None and result.best.measure("loss") == _parameters(result.model)


def _parameters(small: go.Model | None) -> float:
    assert small is not None
    return float(sum(tensor.numel() for tensor in small.params.values()))


def test_what_is_no_longer_what_it_was_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies that were lucky once: the best ones are rejected one by one, and a later one is taken or none."""
    timer, seen = CountedLatency.timer, []

    def twice_as_slow_when_checked(self: CountedLatency, deployed: go.Model) -> Any:
        return lambda: timer(self, deployed)() * (2 if seen and seen[-1] else 1)

    judged = Judge.judge

    def judge(self: Judge, text: str, known: Any = None, *, check: bool = False) -> Any:
        seen.append(check and seen.count(True) < 1)
        return judged(self, text, known, check=check)

    monkeypatch.setattr(CountedLatency, "timer", twice_as_slow_when_checked)
    monkeypatch.setattr(Judge, "judge", judge)
    result = searched(goals={"latency": 0.6}, trials=8)
    assert result.best is not None and next(iter((result.rejected or {}).values())).endswith("is above 0.6")
    assert result.best.number not in (result.rejected or {}) and result.best.measure("latency") <= 0.6


def test_an_interrupt_ends_it_early_and_what_ran_is_tried_first_next_time(tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupted(small: go.Model) -> float:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return _parameters(small)

    options = {"evaluate": interrupted, "goals": {"latency": 0.6}, "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    first = searched(**options)
    assert first.stopped == "interrupted" and first.best is not None and first.verified is not None
    assert [trial.state for trial in first.trials] == ["complete", "complete", "failed"]
    again = searched(**{**options, "trials": 3})
    assert [trial.state for trial in again.trials] == ["complete", "complete", "failed", "complete"]
    assert again.trials[3].pipeline == first.trials[2].pipeline


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"calib": []}, "needs calibration data"),
        ({"trials": 0}, "0 trials are none"),
        ({"passes": "low-rnk"}, "did you mean low-rank"),
        ({"goals": {"speed": 0.5}}, "no goal 'speed'"),
        ({"target": '{"kind": "cpu"}'}, "cannot be written in a pipeline"),
        ({"target": "cortex-a72"}, "cannot be measured here"),
        ({"calib": [(torch.zeros(3, 5),)]}, "calibration batch 0"),
        ({"valid": [(torch.zeros(3, 12) / 0,)]}, "validation batch 0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        searched(**options)


def test_outputs_of_nothing_have_no_loss() -> None:
    net = torch.nn.Linear(12, 6)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    zero = go.capture(net.eval(), (torch.randn(40, 12),))
    with pytest.raises(UsageError, match="the outputs on the data are zero"):
        go.search(zero, calib=batches(), passes=PASSES, backend="reference")


@pytest.mark.parametrize(
    ("readings", "value", "number"),
    [
        ([0.5, 0.501, 0.502], 0.501, 3),
        ([0.5, 0.9, 0.501, 0.502], 0.501, 4),
        ([0.9, 0.2, 0.5, 0.7, 0.502, 0.501], 0.501, 6),
    ],
)
def test_measurements_that_do_not_agree_are_rejected_and_repeated(
    readings: list[float], value: float, number: int
) -> None:
    latency, spread, count = agreed(iter(readings).__next__)
    assert (latency, count) == (value, number) and 0 <= spread <= 0.04


def test_noise_alone_is_refused_but_not_for_ever() -> None:
    left = iter([0.1 * i for i in range(1, 20)])
    with pytest.raises(Refused, match=r"too noisy: 9 measurements from 0\.100 to 0\.900") as caught:
        agreed(left.__next__)
    assert caught.value.again and next(left) == pytest.approx(1.0)


def test_frontier_of_equal_and_beaten_results() -> None:
    points = [(0.5, 0.5, 0.1), (0.5, 0.5, 0.1), (0.6, 0.4, 0.1), (0.6, 0.6, 0.2), (0.4, 0.9, 0.3)]
    trials = [
        Trial(i, "low-rank", "complete", Found(*point, spread=0.0, readings=3, structure=""))
        for i, point in enumerate(points)
    ]
    assert [one.number for one in frontier(trials)] == [4, 0, 2]
    assert [one.number for one in frontier(trials, ("latency", "loss"))] == [4, 0]
