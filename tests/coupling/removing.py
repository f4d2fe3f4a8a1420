"""Removing units from a model, and comparing what is left with the masked original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from graphopt.analysis.coupling import Coupling, Group
from graphopt.analysis.removal import Removal
from graphopt.check import relative_error
from graphopt.model import Model
from graphopt.rewriter import Rewriter
from graphopt.sample import sample_inputs
from graphopt.surgery import cut, masked_outputs
from graphopt.verify import verify

__all__ = ["choices", "removed", "worst_error"]


def removed(coupling: Coupling, classes: Iterable[int]) -> Model:
    """A copy of the model without the classes, verified."""
    copy = coupling.model.clone(share_tensors=True)
    rw = Rewriter(copy)
    cut(rw, Removal(coupling.onto(copy), classes), "a test")
    assert rw.unjournaled() is None
    copy.touch()
    verify(copy)
    return copy


def worst_error(coupling: Coupling, classes: Iterable[int], inputs: list[torch.Tensor] | None = None) -> float:
    """How far the cut model is from the masked one, relative to the largest output."""
    inputs = inputs or sample_inputs(coupling.model)
    classes = list(classes)
    expected = masked_outputs(coupling.model, Removal(coupling, classes), inputs)
    small = removed(coupling, classes)
    with torch.no_grad():
        found = small.call_flat(inputs)
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def choices(coupling: Coupling, seed: int = 0) -> Iterator[tuple[Group, int, list[int]]]:
    """For every family of every group: its first unit, and a random half of its units."""
    generator = torch.Generator().manual_seed(seed)
    for group in coupling.groups.values():
        for index, family in enumerate(group.families):
            order = torch.randperm(len(family), generator=generator).tolist()
            for picked in ([0], order[: len(family) // 2]):
                yield group, index, [c for unit in picked for c in family[unit]]
