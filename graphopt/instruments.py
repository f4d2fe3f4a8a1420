"""Observers of a pipeline: what to print, dump and time while passes run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from graphopt.model import Model
from graphopt.transform import Pass, Report

__all__ = ["DumpAfter", "Instrument", "PrintAfter", "Timing", "TimingTree"]


class Instrument:
    """Told before and after every pass; the methods do nothing unless overridden."""

    def before(self, step: Pass, model: Model) -> None:
        """A pass is about to run."""

    def after(self, step: Pass, model: Model, report: Report) -> None:
        """A pass has run, and its result is verified and checked."""

    def enter(self, group: str) -> None:
        """A group (a preset, or one round of a repetition) begins."""

    def leave(self, group: str) -> None:
        """A group ends."""


@dataclass
class PrintAfter(Instrument):
    """Print the graph after the pass called `when`, after every pass that changed something (`change`), or `all`."""

    when: str
    write: Callable[[str], object] = print

    def after(self, step: Pass, model: Model, report: Report) -> None:
        if self.when == "all" or self.when == report.name or (self.when == "change" and report.changed):
            self.write(f"// after {report.text}\n{model}\n")


@dataclass
class DumpAfter(Instrument):
    """Write the graph after every pass that changed something to `directory`, numbered."""

    directory: Path
    count: int = 0

    def after(self, step: Pass, model: Model, report: Report) -> None:
        if report.changed:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / f"{self.count:03d}-{report.name}.txt").write_text(f"{model}\n")
        self.count += 1


@dataclass
class Timing:
    """A node of the timing tree: seconds of a pass, or of all in a group."""

    name: str
    seconds: float = 0.0
    edits: int = 0
    children: list[Timing] = field(default_factory=list)

    def lines(self, depth: int = 0) -> list[str]:
        own = f"{self.seconds * 1000:9.1f} ms  {'  ' * depth}{self.name}" + (
            f"  {self.edits} edits" if self.edits else ""
        )
        return [own, *(line for child in self.children for line in child.lines(depth + 1))]


class TimingTree(Instrument):
    """Seconds of every pass, verification and check included, in the order and nesting in which they ran."""

    def __init__(self) -> None:
        self.root = Timing("total")
        self._open = [self.root]

    def enter(self, group: str) -> None:
        timing = Timing(group)
        self._open[-1].children.append(timing)
        self._open.append(timing)

    def leave(self, group: str) -> None:
        self._open.pop()

    def after(self, step: Pass, model: Model, report: Report) -> None:
        self._open[-1].children.append(Timing(report.text, report.seconds, len(report.edits)))
        for timing in self._open:
            timing.seconds += report.seconds
            timing.edits += len(report.edits)

    def __str__(self) -> str:
        return "\n".join(self.root.lines())
