"""Cutting positions out of a model: weights, and every number in the graph that says how many there are."""

from __future__ import annotations

from graphopt.surgery.cut import cut
from graphopt.surgery.masked import masked_outputs

__all__ = ["cut", "masked_outputs"]
