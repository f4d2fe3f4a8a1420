"""The plot of `graphopt search`: what is lost against what of the latency is left, and the frontier of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from graphopt.search import Result, Trial

__all__ = ["frontier_plot"]

_LEFT, _TOP, _WIDE, _HIGH = 80, 90, 640, 400
_DOT = (4.0, 9.0)
"""Radius of a model of no size, and of one of the original's."""
_GOAL, _LINE, _OTHER, _ALONE, _BEST = "#b3261e", "#1f5f9e", "#7fa8d1", "#d98a1f", "#1b7f4b"
_STEPS = (1, 2, 5)


class _Axes:
    """Where latencies and losses lie: a linear axis from 0, and a logarithmic one."""

    def __init__(self, trials: Sequence[Trial], limits: dict[str, float]) -> None:
        latencies = [1.0, limits.get("latency", 0.0), *(trial.measure("latency") for trial in trials)]
        losses = [loss for trial in trials if (loss := trial.measure("loss")) > 0]
        losses += [limits["loss"]] if "loss" in limits else []
        self.right = 1.05 * max(latencies)
        low, high = (math.log10(min(losses)), math.log10(max(losses))) if losses else (-2.0, 0.0)
        room = max(0.08 * (high - low), 0.1)
        self.low, self.high = low - room, high + room

    def x(self, latency: float) -> float:
        return _LEFT + _WIDE * latency / self.right

    def y(self, loss: float) -> float:
        place = (math.log10(loss) - self.low) / (self.high - self.low) if loss > 0 else 0.0
        return _TOP + _HIGH * (1 - max(place, 0.0))

    def losses(self) -> list[float]:
        """Losses to name on the axis: 1, 2 and 5 times powers of ten, or only some where these are many."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        wide = self.high - self.low > 2
        values = [step * 10.0**power for power in powers for step in (_STEPS[:1] if wide else _STEPS)]
        return [value for value in values if self.low <= math.log10(value) <= self.high]

    def latencies(self) -> list[float]:
        step = 0.1 if self.right <= 1.3 else 0.5
        return [step * i for i in range(int(self.right / step + 1e-9) + 1)]


def frontier_plot(source: str, result: Result) -> str:
    """An SVG picture: every result as a dot whose size is that of the model."""
    from graphopt.search import frontier

    complete, limits = result.complete, dict(result.goals)
    axes = _Axes(complete, limits)
    line = frontier(complete, ("latency", "loss"))
    title = f"Pipelines for {source}: {len(complete)} results of {len(result.trials)} trials"
    front = {trial.number for trial in line}
    # The frontier lies on top, below it what was tried first.
    dots = sorted(complete, key=lambda one: (one.number in front, bool(one.alone), -one.measure("size")))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDE + 40}" height="{_TOP + _HIGH + 70}"'
        ' font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="16" y="24" font-size="15">{escape(title)}</text>',
        *_legend(limits),
        *_grid(axes),
        *_limits(axes, limits),
        _stairs(axes, line),
        *(_dot(axes, trial, trial.number in front, result) for trial in dots),
        "</svg>\n",
    ])  # fmt: skip


def _legend(limits: dict[str, float]) -> list[str]:
    marks = [(_LINE, "frontier"), (_OTHER, "other pipelines"), (_ALONE, "one pass alone, tried first"), (_BEST, "best")]
    marks += [(_GOAL, "goal")] if limits else []
    drawn, x = [], 16
    for colour, name in marks:
        drawn.append(f'<circle cx="{x + 6}" cy="46" r="6" fill="{colour}"/><text x="{x + 18}" y="50">{name}</text>')
        x += 40 + 7 * len(name)
    note = "The larger a dot, the more bytes of weights are left. Point at one to see its pipeline."
    return [*drawn, f'<text x="16" y="72" fill="#666">{note}</text>']


def _grid(axes: _Axes) -> list[str]:
    bottom, right = _TOP + _HIGH, _LEFT + _WIDE
    drawn = []
    for latency in axes.latencies():
        x = axes.x(latency)
        drawn.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e3e6ea"/>')
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{latency:.1f}</text>')
    for loss in axes.losses():
        y = axes.y(loss)
        drawn.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e3e6ea"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    middle = _TOP + _HIGH // 2
    return [
        *drawn,
        f'<text x="{_LEFT + _WIDE // 2}" y="{bottom + 44}" text-anchor="middle">'
        "latency, as a part of the original's (both compiled)</text>",
        f'<text x="22" y="{middle}" text-anchor="middle" transform="rotate(-90 22 {middle})">loss</text>',
    ]


def _limits(axes: _Axes, limits: dict[str, float]) -> list[str]:
    drawn = []
    if "latency" in limits:
        x = axes.x(limits["latency"])
        drawn.append(f'<line class="goal" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_TOP + _HIGH}" stroke="{_GOAL}"/>')
    if "loss" in limits:
        y = axes.y(limits["loss"])
        drawn.append(
            f'<line class="goal" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDE}" y2="{y:.1f}" stroke="{_GOAL}"/>'
        )
    return drawn


def _stairs(axes: _Axes, line: Sequence[Trial]) -> str:
    """What is reached by the frontier: a loss stays until a result with more latency has a smaller one."""
    if not line:
        return ""
    points = [(axes.x(trial.measure("latency")), axes.y(trial.measure("loss"))) for trial in line]
    path = f"M{points[0][0]:.1f},{_TOP} V{points[0][1]:.1f}"
    path += "".join(f" H{x:.1f} V{y:.1f}" for x, y in points[1:]) + f" H{_LEFT + _WIDE}"
    return f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>'


def _dot(axes: _Axes, trial: Trial, in_front: bool, result: Result) -> str:
    is_best = result.best is not None and trial.number == result.best.number
    colour = _BEST if is_best else _ALONE if trial.alone else _LINE if in_front else _OTHER
    small, large = _DOT
    radius = small + (large - small) * min(trial.measure("size"), 1.0)
    x, y = axes.x(trial.measure("latency")), axes.y(trial.measure("loss"))
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in trial.measures.items())
    edge = f' stroke="{_LINE}" stroke-width="2"' if in_front and colour != _LINE else ' stroke="white"'
    return (
        f'<circle class="trial" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity="0.85"{edge}>'
        f"<title>trial {trial.number}: {numbers}: {escape(trial.pipeline)}</title></circle>"
    )
