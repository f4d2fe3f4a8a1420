"""Cutting positions out of a model: weights, and every number in the graph that says how many there are; and putting
what is left back into the module that the model came from."""

from __future__ import annotations

from graphopt.surgery.cut import cut
from graphopt.surgery.masked import masked_outputs
from graphopt.surgery.write_back import Change, write_back

__all__ = ["Change", "cut", "masked_outputs", "write_back"]
