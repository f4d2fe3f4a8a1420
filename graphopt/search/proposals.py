"""Pipelines from the parameters of Optuna's trials, and the parameters of the first ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from graphopt.search.asked import Goals, Searched
from graphopt.space import Choices, Range, Values

if TYPE_CHECKING:
    from optuna.trial import Trial as OptunaTrial

__all__ = ["Baseline", "alone", "baselines", "gentle", "proposed"]

_GENTLE = 0.9
"""The budget of a second try of a pass that cannot reach the goal by itself."""


@dataclass(frozen=True)
class Baseline:
    """A trial that is there from the start. `alone` is the pass that it has, if that is one."""

    params: Mapping[str, Any]
    alone: str = ""


def baselines(passes: Sequence[Searched], goals: Goals, most: int) -> list[Baseline]:
    """Every pass alone at the goal; then pairs, each pass of which goes half of the way, as long as there are at most
    `most` of all."""
    found = [alone(one, passes, goals) for one in passes]
    for pair in list(combinations(passes, 2))[: max(0, most - len(found))]:
        found.append(Baseline(_params(pair, passes, goals, share=0.5)))
    return found


def alone(one: Searched, passes: Sequence[Searched], goals: Goals) -> Baseline:
    """A pass alone at the goal."""
    return Baseline(_params((one,), passes, goals, share=1.0), one.name)


def gentle(one: Searched, passes: Sequence[Searched]) -> Baseline:
    """A pass alone that takes away little."""
    return Baseline(_params((one,), passes, Goals({"latency": _GENTLE, "size": _GENTLE}), share=1.0), one.name)


def _params(used: Sequence[Searched], passes: Sequence[Searched], goals: Goals, share: float) -> dict[str, Any]:
    params: dict[str, Any] = {one.name: one in used for one in passes}
    for one in used:
        params[f"{one.name}.place"] = one.place
        params |= {f"{one.name}.{name}": _start(values) for name, values in one.options.items()}
        aim = one.aimed_at(goals)
        if aim is not None:
            budget, part = aim
            params[f"{one.name}.budget"] = budget
            values = one.budgets[budget]
            # Parts of parts multiply; a number, such as one of experts, is no part.
            reached = part**share if isinstance(values, Range) and values.high <= 1 else None
            params[f"{one.name}.{budget}"] = _start(values) if reached is None else _inside(values, reached)
    return params


def _start(values: Values) -> Any:
    if isinstance(values, Choices):
        return values.values[0]
    return int(values.start) if values.whole else values.start


def _inside(values: Values, value: float) -> float:
    assert isinstance(values, Range)
    return min(max(value, values.low), values.high)


def proposed(
    trial: OptunaTrial, passes: Sequence[Searched], left_out: Collection[str], where: Mapping[str, str]
) -> str:
    """The text of the pipeline that a trial stands for, empty where it uses no pass.

    Args:
        left_out: names of passes that are not used any more.
        where: options that say where a latency is measured.
    """
    used = [one for one in passes if one.name not in left_out and trial.suggest_categorical(one.name, [False, True])]
    if len(used) > 1:
        places = {one.name: trial.suggest_float(f"{one.name}.place", 0.0, 1.0) for one in used}
        used = sorted(used, key=lambda one: places[one.name])
    return ",".join(_step(trial, one, where) for one in used)


def _step(trial: OptunaTrial, one: Searched, where: Mapping[str, str]) -> str:
    given = dict(_options(trial, one, where))
    return one.name + (f"{{{','.join(f'{name}={value}' for name, value in given.items())}}}" if given else "")


def _options(trial: OptunaTrial, one: Searched, where: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from one.fixed.items()
    if one.budgets:
        names = list(one.budgets)
        budget = names[0] if len(names) == 1 else str(trial.suggest_categorical(f"{one.name}.budget", names))
        yield budget, _suggested(trial, f"{one.name}.{budget}", one.budgets[budget])
        if budget == "latency":
            yield from ((name, where[name]) for name in one.measured_with if name in where)
    elif "latency" in one.fixed:
        yield from ((name, where[name]) for name in one.measured_with if name in where)
    for name, values in one.options.items():
        yield name, _suggested(trial, f"{one.name}.{name}", values)


def _suggested(trial: OptunaTrial, name: str, values: Values) -> str:
    if isinstance(values, Choices):
        return str(trial.suggest_categorical(name, list(values.values)))
    if values.whole:
        return values.text(trial.suggest_int(name, int(values.low), int(values.high)))
    return values.text(trial.suggest_float(name, values.low, values.high))
