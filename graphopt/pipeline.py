"""Pipelines: passes in order, repeated to a fixed point where asked, verified and checked after each."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.analysis.cost import Cost, cost
from graphopt.check import Oracle
from graphopt.errors import GraphoptError, PassFailed, UsageError
from graphopt.instruments import Instrument
from graphopt.model import Model
from graphopt.names import nearest
from graphopt.registry import PRESETS, get_pass, pass_names
from graphopt.rewriter import Rewriter
from graphopt.sample import check_batch
from graphopt.transform import Check, Contract, Pass, Report, parse_value
from graphopt.verify import verify

__all__ = ["Pipeline", "Repeat", "run"]

_MAX_ROUNDS = 20
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][\w.-]*)|(?P<mark>[(),{}]))")


@dataclass(frozen=True)
class Repeat:
    """Steps that run again and again until a round changes nothing. `name` is the preset it stands for, if any."""

    steps: tuple[Pass | Repeat, ...]
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"repeat({','.join(map(str, self.steps))})"


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes, with the text form `fold-batch-norm,prune-channels{latency=0.5}`.

    `repeat(a,b)` runs its passes to a fixed point; the name of a preset stands for the preset.
    """

    steps: tuple[Pass | Repeat, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the text form.

        Raises:
            UsageError: naming every unknown pass and option at once, with the nearest names.
        """
        parser = _Parser(text)
        steps = parser.steps(end=None)
        if parser.problems:
            raise UsageError("; ".join(parser.problems), where=f"pipeline '{text}'")
        return cls(tuple(steps))

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    def passes(self) -> Iterator[Pass]:
        """All passes, each once a mention."""
        stack = list(reversed(self.steps))
        while stack:
            step = stack.pop()
            if isinstance(step, Pass):
                yield step
            else:
                stack.extend(reversed(step.steps))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.problems: list[str] = []

    def token(self) -> tuple[str, str]:
        if not self.text[self.at :].strip():
            return "end", ""
        found = _TOKEN.match(self.text, self.at)
        if found is None:
            raise UsageError(f"a pipeline cannot hold {self.text[self.at :].strip()[0]!r}", where=self._place())
        self.at = found.end()
        return (found.lastgroup or "", found.group(found.lastgroup or 0))

    def peek(self) -> str:
        at = self.at
        value = self.token()[1]
        self.at = at
        return value

    def steps(self, end: str | None) -> list[Pass | Repeat]:
        found: list[Pass | Repeat] = []
        while True:
            kind, name = self.token()
            if kind != "name":
                raise UsageError(f"a pass name is missing{f' before {name!r}' if name else ''}", where=self._place())
            step = self.step(name)
            if step is not None:
                found.append(step)
            kind, mark = self.token()
            if mark == ",":
                continue
            if (end is None and kind == "end") or (end is not None and mark == end):
                return found
            expected = "',' or the end" if end is None else f"',' or '{end}'"
            raise UsageError(f"{expected} is missing after '{name}'", where=self._place())

    def step(self, name: str) -> Pass | Repeat | None:
        if name == "repeat" and self.peek() == "(":
            self.token()
            return Repeat(tuple(self.steps(end=")")))
        if name in PRESETS:
            return Repeat(_unwrap(Pipeline.parse(PRESETS[name]).steps), name=name)
        options = self.options() if self.peek() == "{" else {}
        if name not in pass_names():
            self.problems.append(f"there is no pass '{name}': {nearest(name, [*pass_names(), *PRESETS])}")
            return None
        return self.build(get_pass(name), options)

    def options(self) -> dict[str, str]:
        close = self.text.find("}", self.at)
        if close < 0:
            raise UsageError("'}' is missing", where=self._place())
        start = self.text.index("{", self.at) + 1
        body, self.at = self.text[start:close], close + 1
        options = {}
        for item in filter(None, (part.strip() for part in body.split(","))):
            key, mark, value = item.partition("=")
            options[key.strip()] = value.strip() if mark else "true"
        return options

    def build(self, cls: type[Pass], options: dict[str, str]) -> Pass | None:
        known, values, sound = cls.options(), {}, True
        for key, text in options.items():
            if key not in known:
                hint = nearest(key, known) if known else "it takes no options"
                self.problems.append(f"'{cls.name}' has no option '{key}': {hint}")
                sound = False
                continue
            try:
                values[key.replace("-", "_")] = parse_value(text, known[key].type)
            except ValueError:
                kind = getattr(known[key].type, "__name__", str(known[key].type))
                self.problems.append(f"option '{key}' of '{cls.name}' is a {kind}, not '{text}'")
                sound = False
        missing = [name for name, option in known.items() if option.required and name not in options]
        self.problems += [f"'{cls.name}' needs the option '{name}'" for name in missing]
        return cls(**values) if sound and not missing else None

    def _place(self) -> str:
        return f"{self.text}\n{' ' * max(self.at - 1, 0)}^"


def _unwrap(steps: tuple[Pass | Repeat, ...]) -> tuple[Pass | Repeat, ...]:
    return steps[0].steps if len(steps) == 1 and isinstance(steps[0], Repeat) else steps


def run(
    model: Model,
    pipeline: str | Pipeline | Pass | Sequence[Pass],
    *,
    check: bool = True,
    calib: Iterable[Sequence[torch.Tensor]] | None = None,
    instruments: Sequence[Instrument] = (),
    limit: int | None = None,
    repro: str | Path | None = None,
) -> tuple[Model, list[Report]]:
    """Apply passes to a copy of `model`; the model itself stays as it is, and the result shares no tensor with it.

    After every pass the invariants are verified; after every pass that changed something the outputs are compared
    with those of `model`, within the contract of the passes so far.

    Args:
        pipeline: the text form, a Pipeline, a pass or a list of passes.
        check: whether to compare outputs.
        calib: batches of flat tensor inputs, for lossy passes to calibrate with and for that comparison; without them
            the comparison uses seeded random ones.
        limit: stop after about that many edits, for bisection.
        repro: a folder for a reproducer, written when a pass fails.

    Raises:
        UsageError: for unknown passes and options, and for options that a pass cannot work with on this model.
        PassFailed: when a pass raises, breaks an invariant, edits past the rewriter or does not come to an end.
        CheckFailed: when the outputs changed by more than a pass promised (as the cause of a PassFailed).
    """
    if isinstance(pipeline, str):
        pipeline = Pipeline.parse(pipeline)
    elif not isinstance(pipeline, Pipeline):
        pipeline = Pipeline((pipeline,) if isinstance(pipeline, Pass) else tuple(pipeline))
    verify(model)
    batches = tuple(tuple(batch) for batch in calib or ())
    for number, batch in enumerate(batches):
        check_batch(model.signature, batch, where=f"calibration batch {number}")
    runner = _Runner(model, pipeline, check, batches, tuple(instruments), limit, Path(repro) if repro else None)
    return runner.result()


class _Runner:
    def __init__(
        self,
        model: Model,
        pipeline: Pipeline,
        check: bool,
        calib: tuple[tuple[torch.Tensor, ...], ...],
        instruments: tuple[Instrument, ...],
        limit: int | None,
        repro: Path | None,
    ) -> None:
        self.original, self.pipeline, self.instruments = model, pipeline, instruments
        self.limit, self.repro = limit, repro
        self.model = model.clone(share_tensors=True)
        self.calib, self.check = calib, check
        self.oracle: Oracle | None = None
        self.contract = Contract.EXACT
        self.reports: list[Report] = []
        self.cost: Cost | None = None

    def result(self) -> tuple[Model, list[Report]]:
        for step in self.pipeline.steps:
            self.step(step)
        self.model.own_tensors(self.original)
        self.model.history = (*self.original.history, *(str(step) for step in self.pipeline.steps))
        return self.model, self.reports

    def step(self, step: Pass | Repeat) -> bool:
        """Run a pass or a repetition; says whether it changed anything."""
        if isinstance(step, Pass):
            return self.apply(step)
        changed_ever = False
        for round_ in range(1, _MAX_ROUNDS + 1):
            group = f"{step} round {round_}"
            for instrument in self.instruments:
                instrument.enter(group)
            changed = [self.step(inner) for inner in step.steps]
            for instrument in self.instruments:
                instrument.leave(group)
            if not any(changed):
                return changed_ever
            changed_ever = True
        last = [str(inner) for inner, did in zip(step.steps, changed, strict=True) if did]
        raise PassFailed(
            f"'{step}' has not come to a fixed point after {_MAX_ROUNDS} rounds",
            why=f"these passes still change the graph: {', '.join(last)}",
            todo="run them one by one and compare the printed graphs: two of them undo each other",
        )

    def apply(self, step: Pass) -> bool:
        if self.check and self.oracle is None:
            self.oracle = Oracle(self.original, self.calib)
        for instrument in self.instruments:
            instrument.before(step, self.model)
        start = time.perf_counter()
        edited = sum(len(report.edits) for report in self.reports)
        left = None if self.limit is None else max(self.limit - edited, 0)
        rewriter = Rewriter(self.model, limit=left, calib=self.calib)
        before = self._cost()
        try:
            step.run(rewriter)
            problem = rewriter.unjournaled()
            if problem:
                raise GraphoptError(f"it edits past the rewriter: {problem}")
            verify(self.model)
            check = self._judge(step) if rewriter.changed else None
        except UsageError as error:  # of the caller's, not of the pass's
            error.where = error.where or f"pass '{step}'"
            raise
        except Exception as error:
            raise self._failure(step, error) from error
        if rewriter.changed:
            self.cost = None
        report = Report(
            step.name,
            str(step),
            tuple(rewriter.edits),
            tuple(rewriter.misses),
            time.perf_counter() - start,
            before if rewriter.changed else None,
            self._cost() if rewriter.changed else None,
            check,
            rewriter.findings,
        )
        self.reports.append(report)
        for instrument in self.instruments:
            instrument.after(step, self.model, report)
        return rewriter.changed

    def _cost(self) -> Cost:
        if self.cost is None:
            self.cost = cost(self.model)
        return self.cost

    def _judge(self, step: Pass) -> Check | None:
        self.model.touch()
        if step.contract.name == "lossy" or (step.contract.rtol or 0.0) > (self.contract.rtol or 0.0):
            self.contract = step.contract
        return self.oracle.judge(self.model, self.contract) if self.oracle is not None else None

    def _failure(self, step: Pass, error: Exception) -> PassFailed:
        done = [report.text for report in self.reports]
        where = f"pass '{step}', after {', '.join(done) if done else 'no other pass'}"
        if isinstance(error, GraphoptError) and error.where:
            where += f"\n{error.where}"
        what = error.what if isinstance(error, GraphoptError) else f"{type(error).__name__}: {error}"
        todo = "the model is as it was; leave the pass out, or report it"
        if self.repro is not None:
            from graphopt.repro import write_reproducer

            write_reproducer(
                self.repro, self.original, self.pipeline, len(done), what, check=self.check, limit=self.limit
            )
            todo += f" with the reproducer in {self.repro}: `graphopt repro {self.repro}` runs it again"
        return PassFailed(f"'{step.name}' failed: {what}", where=where, why=_why(error), todo=todo)


def _why(error: Any) -> str | None:
    return error.why if isinstance(error, GraphoptError) else None
