"""Labels: for every element of every tensor, the position that it goes with when positions are removed.

A label tensor has the shape of the tensor it speaks of (int64, at the sizes of the example):

- a positive label is an *atom*: all elements with one atom are removed together
- 0 stands for an element that goes with whatever is around it: padding, a constant
- a negative label is pinned: it is never removed, and its number is that of the reason

Operators that move data are run on labels; the others have one rule for each of their axis behaviours. A rule that
cannot say what happens pins, with a reason: it never guesses.
"""

from __future__ import annotations

from graphopt.analysis.labels.atoms import Atoms, Classes, Labels, Reason, axis_positions, compact, varies
from graphopt.analysis.labels.trace import Grid, Link, Slot, Trace

__all__ = [
    "Atoms",
    "Classes",
    "Grid",
    "Labels",
    "Link",
    "Reason",
    "Slot",
    "Trace",
    "axis_positions",
    "compact",
    "varies",
]
