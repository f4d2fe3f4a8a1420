"""Chains of layers as the fewest and cheapest layers that compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from graphopt.passes._kernel import Kernel, Refused
from graphopt.passes._linear import Step, read_step, steps_to
from graphopt.passes._merged_layer import Price, common_path, emit, why_apart, why_not_finite
from graphopt.passes._merging import border_exact, compose
from graphopt.passes._rounds import Note
from graphopt.rewriter import Node, Rewriter

__all__ = ["chain_to", "merge_chain"]


@dataclass(frozen=True)
class _Stretch:
    """Steps `start` to `end` (not included) of a chain as one layer, or a single step as it is."""

    start: int
    end: int
    kernel: Kernel
    shifts: bool
    cost: float


def chain_to(rw: Rewriter, node: Node, axes: int, note: Note) -> list[Step]:
    """The steps that end at a layer, first to last; empty for a layer that cannot be merged with any other."""
    last = read_step(rw, node, axes)
    if not isinstance(last, Step):
        if last is not None:
            note(node, last)
        return []
    steps, stopped = steps_to(rw, last.source, node, axes)
    if stopped is not None:
        note(node, f"what it reads is not merged into it: {stopped}")
    return [*steps, last]


def merge_chain(rw: Rewriter, steps: Sequence[Step], price: Price, note: Note, *, move: bool) -> Node | None:
    """Merge what pays of a chain; the last call written, None where nothing was.

    Args:
        move: whether paddings may be moved in front, which changes what is computed at the border.
    """
    plan = _cheapest(rw, steps, price, note, move)
    made: Node | None = None
    renamed: dict[Node, Node] = {}
    for stretch in plan:
        part = steps[stretch.start : stretch.end]
        if _layers(part) < 2 or rw.exhausted:
            continue
        output = part[-1].node
        kernel = reduce(compose, (step.kernel for step in part))
        why = why_not_finite(kernel, rw.fake(output).dtype)
        if why is not None:
            note(output, why)
            continue
        source = renamed.get(part[0].source, part[0].source)
        made = renamed[output] = emit(rw, kernel, source, part, common_path(part, "merged"), before=output)
        rw.replace(output, made, f"merged: {', '.join(step.node.name for step in part)}")
    return made


def _layers(steps: Sequence[Step]) -> int:
    return sum(not step.is_free for step in steps)


def _cheapest(rw: Rewriter, steps: Sequence[Step], price: Price, note: Note, move: bool) -> list[_Stretch]:
    """The stretches of least cost that make up the chain: all splits of it, by dynamic programming."""
    singles = [
        _Stretch(at, at + 1, replace(step.kernel.meta(), bias=None), _shifts(step), price.of_steps(rw, [step]))
        for at, step in enumerate(steps)
    ]
    best: list[tuple[float, list[_Stretch]]] = [(0.0, [])]
    open_: list[_Stretch] = []
    for at, single in enumerate(singles):
        grown = (_longer(rw, steps, stretch, singles[at], price, note, move) for stretch in open_)
        open_ = [stretch for stretch in grown if stretch is not None] + [single]
        useful = [s for s in open_ if s.end - s.start == 1 or _layers(steps[s.start : s.end]) > 1]
        # Equally cheap: the longest stretch, which is one layer instead of several.
        taken = min(useful, key=lambda s: (best[s.start][0] + s.cost, s.start))
        best.append((best[taken.start][0] + taken.cost, [*best[taken.start][1], taken]))
        for stretch in useful:
            apart = sum(one.cost for one in singles[stretch.start : stretch.end])
            if stretch.cost > apart:
                first = steps[stretch.start].node.name
                note(steps[at].node, f"merging it with '{first}' {price.takes(stretch.cost, apart)}")
    return best[-1][1]


def _shifts(step: Step) -> bool:
    return step.kernel.bias is not None and bool((step.kernel.bias != 0).any())


def _longer(
    rw: Rewriter, steps: Sequence[Step], stretch: _Stretch, step: _Stretch, price: Price, note: Note, move: bool
) -> _Stretch | None:
    """A stretch with the next step; None where that is not one layer."""
    first, last = steps[stretch.start], steps[step.start]
    bias = torch.ones(1, dtype=torch.float64) if stretch.shifts else None
    why = None if move else border_exact(replace(stretch.kernel, bias=bias), step.kernel)
    part = steps[stretch.start : step.end]
    if why is None and any(one.layer is not None for one in part):
        why = why_apart(rw, part)
    if why is not None:
        if step.start == stretch.end and stretch.end - stretch.start == 1:
            note(last.node, f"after '{first.node.name}': {why}")
        return None
    try:
        kernel = compose(stretch.kernel, step.kernel)
    except Refused as error:
        note(last.node, f"after '{first.node.name}': {error.what}")
        return None
    cost = price.of_kernel(rw, kernel, first.source, last.node) if _layers(part) > 1 else stretch.cost + step.cost
    return _Stretch(stretch.start, step.end, kernel, stretch.shifts or step.shifts, cost)
