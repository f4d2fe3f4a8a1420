"""What a search is asked for: goals, and passes with what may be tried of each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.errors import UsageError
from graphopt.names import nearest
from graphopt.registry import PRESETS, get_pass, pass_names
from graphopt.space import Choices, Range, Space, Values
from graphopt.transform import Option, Pass, parse_value

__all__ = ["MEASURES", "Goals", "Searched", "describe", "parse_goals", "parse_passes", "usual_passes"]

MEASURES = ("latency", "size", "loss")
"""What every trial is judged by. Latency and size are parts of the original's as deployed."""

_BUDGET_OF = {"latency": "latency", "size": "params"}
"""The budget of a pass that aims at a goal."""
_MEASURED_WITH = ("target", "threads")
"""Options that a budget in latency needs; the search has them."""
_HALF = 0.5
_STEP = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")


@dataclass(frozen=True)
class Goals:
    """Limits that the result has to keep, by measure, and what is made small: one measure where there are limits, all
    where there are none."""

    limits: Mapping[str, float]

    @property
    def objectives(self) -> tuple[str, ...]:
        free = [name for name in ("loss", "latency", "size") if name not in self.limits]
        return (free[0],) if self.limits else MEASURES

    def excess(self, found: Mapping[str, float]) -> dict[str, float]:
        """How far measures are above their limits, relative to these; not above 0 where they are kept."""
        return {name: found[name] / limit - 1 for name, limit in self.limits.items()}

    def __str__(self) -> str:
        return ",".join(f"{name}={limit:g}" for name, limit in self.limits.items())


@dataclass(frozen=True)
class Searched:
    """A pass of a search: what is fixed of it, and what is tried."""

    cls: type[Pass]
    fixed: Mapping[str, str]
    budgets: Mapping[str, Values]
    options: Mapping[str, Values]
    place: float

    @property
    def name(self) -> str:
        return self.cls.name

    @property
    def measured_with(self) -> tuple[str, ...]:
        """Options that say where a latency is measured, where the pass has them and the user has not fixed them."""
        return tuple(name for name in _MEASURED_WITH if name in self.cls.options() and name not in self.fixed)

    def aimed_at(self, goals: Goals) -> tuple[str, float] | None:
        """The budget, and its value, that brings a model to the goals by this pass alone."""
        for goal, budget in _BUDGET_OF.items():
            if goal in goals.limits and budget in self.budgets:
                return budget, goals.limits[goal]
        parts = [goals.limits[goal] for goal in _BUDGET_OF if goal in goals.limits]
        return (next(iter(self.budgets)), min(parts, default=_HALF)) if self.budgets else None

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in (*self.fixed.items(), *self.budgets.items())]
        return f"{self.name}{{{','.join([*parts, *(f'{name}={value}' for name, value in self.options.items())])}}}"


def parse_goals(goals: Mapping[str, float]) -> Goals:
    """Check goals.

    Raises:
        UsageError: for an unknown measure, a limit that is none, or limits for all measures.
    """
    for name, limit in goals.items():
        if name not in MEASURES:
            raise UsageError(f"there is no goal '{name}'", todo=nearest(name, MEASURES))
        if not (0 < limit < 1 or (name == "loss" and 0 < limit < math.inf)):
            raise UsageError(
                f"the goal {name}={limit:g} is none",
                todo="give the part of the original's to reach, between 0 and 1, or a loss above 0",
            )
    if len(goals) == len(MEASURES):
        raise UsageError("with goals for latency, size and loss nothing is left to make small", todo="leave one out")
    return Goals({name: float(goals[name]) for name in MEASURES if name in goals})


def usual_passes() -> list[Searched]:
    """All passes that declare what to try of them, in their usual order."""
    classes = [get_pass(name) for name in pass_names()]
    found = [_searched(cls, {}) for cls in classes if cls.space is not None]
    return sorted(found, key=lambda one: (one.place, one.name))


def parse_passes(text: str) -> list[Searched]:
    """Read `prune-channels{macs=0.3..0.9,importance=taylor|fisher},low-rank`: passes to try, in their usual order. An
    option is fixed by a value, and tried where it has a range or several values; the others are tried as the pass
    declares.

    Raises:
        UsageError: naming every unknown pass, option and value at once, with the nearest names.
    """
    problems: list[str] = []
    found: list[Searched] = []
    at = 0
    while at < len(text) or not found:
        step = _STEP.match(text, at)
        if step is None or (step[3] == "," and not text[step.end() :].strip()):
            raise UsageError("the list of passes cannot be read", where=f"{text}\n{' ' * at}^")
        at = step.end()
        name = step[1]
        if name not in pass_names():
            preset = "it is a preset, which is run before a build in any case" if name in PRESETS else None
            problems.append(f"there is no pass '{name}' to try: {preset or nearest(name, pass_names())}")
        elif any(one.name == name for one in found):
            problems.append(f"'{name}' is listed twice")
        else:
            one = _searched(get_pass(name), _values(get_pass(name), step[2] or "", problems))
            known = {*one.fixed, *one.budgets, *one.options}
            missing = [key for key, option in one.cls.options().items() if option.required and key not in known]
            problems += [f"'{name}' needs the option '{key}', or values to try for it" for key in missing]
            found.append(one)
        if problems and at >= len(text):
            break
    if problems:
        raise UsageError("; ".join(problems), where=f"passes '{text}'")
    return sorted(found, key=lambda one: one.place)


def _values(cls: type[Pass], body: str, problems: list[str]) -> dict[str, Values]:
    """What the user says of options; a fixed one has one value."""
    known, given = cls.options(), {}
    for item in filter(None, (part.strip() for part in body.split(","))):
        name, mark, text = (part.strip() for part in item.partition("="))
        if name not in known:
            hint = nearest(name, known) if known else "it takes no options"
            problems.append(f"'{cls.name}' has no option '{name}': {hint}")
            continue
        values = _parsed(known[name], text if mark else "true")
        if values is None:
            kind = getattr(known[name].type, "__name__", str(known[name].type))
            problems.append(f"option '{name}' of '{cls.name}' is a {kind}, not '{text}'")
        else:
            given[name] = values
    return given


def _parsed(option: Option, text: str) -> Values | None:
    low, dots, high = text.partition("..")
    try:
        if dots:
            ends = parse_value(low, option.type), parse_value(high, option.type)
            if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends) or ends[0] > ends[1]:
                return None
            return Range(float(ends[0]), float(ends[1]), whole=all(isinstance(end, int) for end in ends))
        values = Choices(tuple(dict.fromkeys(text.split("|"))))
        for value in values.values:
            parse_value(value, option.type)
    except ValueError:
        return None
    return values


def _searched(cls: type[Pass], given: Mapping[str, Values]) -> Searched:
    space = cls.space or Space()
    fixed = {
        name: values.values[0]
        for name, values in given.items()
        if isinstance(values, Choices) and len(values.values) == 1
    }
    tried = {name: values for name, values in given.items() if name not in fixed}
    named = given.keys() & space.budgets.keys()
    budgets = {name: tried[name] for name in tried if name in space.budgets} if named else dict(space.budgets)
    options = {name: values for name, values in space.options.items() if name not in fixed}
    options |= {name: values for name, values in tried.items() if name not in space.budgets}
    return Searched(cls, fixed, budgets, options, space.place)


def describe(passes: Sequence[Searched]) -> str:
    """The whole space as text, by which studies are told apart."""
    return ",".join(map(str, passes))
