"""Forms of a factorised layer: shapes, numbers, the weight that they stand for, and calls. Here that of tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from graphopt.ops import argument
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_problem import SOLVERS, Problem, Solver, basis
from graphopt.passes._factor_writer import Writer
from graphopt.rewriter import Node

__all__ = ["Form", "Ranks", "Rows"]

aten = torch.ops.aten

Ranks: TypeAlias = tuple[int, ...]
"""How many channels there are between the factors of a layer; some forms have several numbers."""


class Form(ABC):
    """A way to write a layer as several.

    Attributes:
        name: the one that users choose it by.
        solvers: those that it has.
    """

    name: str
    solvers: ClassVar[Sequence[Solver]] = SOLVERS

    @abstractmethod
    def why_not(self, whole: Whole) -> str | None:
        """Why a layer cannot be written like this."""

    @abstractmethod
    def full(self, whole: Whole) -> Ranks:
        """The ranks with which nothing is lost, or beyond which nothing is gained."""

    @abstractmethod
    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        """The factors on the meta device, in the order in which they are applied."""

    @abstractmethod
    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        """The factors in float64, or large ones in a dtype that holds what the layer's own does."""

    @abstractmethod
    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        """The weight of the one layer that they are."""

    @abstractmethod
    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        """Their calls; the layer's bias is added by the last one."""

    @property
    def is_direct(self) -> bool:
        """Whether the errors of all ranks follow from one decomposition."""
        return False

    def errors(self, problem: Problem, wanted: Sequence[Ranks]) -> list[float]:
        """The error that each of some ranks has."""
        return [problem.error(self.dense(problem.whole, self.factors(problem, ranks))) for ranks in wanted]


@dataclass(frozen=True)
class Rows(Form):
    """An embedding with fewer features and a linear layer behind it: W [entries, features] = B [entries, r] A^T, A
    [features, r]. With data entries count as often as they are looked up."""

    name: str = "embedding"
    solvers: ClassVar[Sequence[Solver]] = ("svd", "activation", "fisher", "random")

    def why_not(self, whole: Whole) -> str | None:
        return None if whole.embedding else "it is no embedding"

    def full(self, whole: Whole) -> Ranks:
        return (min(whole.kernel.weight.shape),)

    def empty(self, whole: Whole, ranks: Ranks) -> list[Tensor]:
        entries, features = whole.kernel.weight.shape
        new = whole.kernel.weight.new_empty
        return [new(entries, ranks[0]), new(features, ranks[0])]

    @property
    def is_direct(self) -> bool:
        return True

    def factors(self, problem: Problem, ranks: Ranks) -> list[Tensor]:
        u = self._basis(problem)[:, : ranks[0]]
        both = [problem.by_outputs(which, u[None])[0] for which in (0, 1)]
        return [problem.weight @ both[0], both[1]]

    def errors(self, problem: Problem, wanted: Sequence[Ranks]) -> list[float]:
        u = self._basis(problem)
        covered = self._scaled(problem).T @ u
        squares = covered.square() if problem.moments is None else covered.square() * problem.moments[:, None]
        beyond = squares.sum(0).flip(0).cumsum(0).flip(0).tolist()
        return [beyond[ranks[0]] if ranks[0] < len(beyond) else 0.0 for ranks in wanted]

    def dense(self, whole: Whole, factors: Sequence[Tensor]) -> Tensor:
        return factors[0] @ factors[1].T

    def write(self, writer: Writer, whole: Whole, factors: Sequence[Tensor]) -> Node:
        table = writer.tensor("0.weight", factors[0])
        found = writer.call(aten.embedding.default, table, writer.source, argument(whole.node, "padding_idx"))
        return writer.call(aten.linear.default, found, writer.tensor("1.weight", factors[1]), None)

    @staticmethod
    def _basis(problem: Problem) -> Tensor:
        scaled = Rows._scaled(problem)
        if problem.is_aware and problem.moments is not None:
            scaled = scaled * problem.moments.sqrt()
        return basis(scaled, None, problem)

    @staticmethod
    def _scaled(problem: Problem) -> Tensor:
        """[features, entries], in the measure of the outputs."""
        return problem.by_outputs(0, problem.weight.T[None])[0]
