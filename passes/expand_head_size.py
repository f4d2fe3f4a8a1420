"""Larger values of attention that compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes._expansion_pass import Widening
from graphopt.passes._expansion_sites import Part
from graphopt.transform import Contract

__all__ = ["ExpandHeadSize"]


@dataclass(frozen=True)
class ExpandHeadSize(Widening):
    """Add features to the values of every head of attention, without changing what the model computes.

    What:
        Every head of values gets more features; the layer behind attention reads them with weights that are zero. Where
        one layer makes queries, keys and values as one box [3, heads, size], queries and keys grow along, as
        `expand-attention` lets them. `remove-channels` of what the report names as new gives the model back as it was.

    Algebra:
        O [out, heads size] reads the values of each head, V [heads size, in]. Per head, O_h V_h becomes [O_h 0] [V_h;
        N] with N [new, in] drawn from a normal distribution with the deviation of V.

    When it applies:
        To attention of two features a head or more, as one operator or written out. Refused with the reason: statistics
        over the axis (such as a norm of queries and keys, where these grow along), dropout in training mode, weights
        that make positions in one place and read them in another, what an unknown operator touches.
        Options: `by`, how many are added to every head, or `to`, how many there are then (fewer: nothing is done);
        `only` and `leave`, names of groups or of modules that they are in; `init`, `normal` or `copy`, the last again;
        `seed`.

    Safety:
        Exact: sums get terms that are zero times a finite number. Proven on the spot by a run of both models. Run
        twice, `by` adds twice; `to` does nothing the second time.

    Cost:
        Three walks over the graph for each group, two runs of the model.

    Source:
        Gesmundo & Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023, section 3.3.

    Example:
        >>> import torch, graphopt
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q, self.k, self.v, self.out = (torch.nn.Linear(8, 8) for _ in range(4))
        ...     def forward(self, x):
        ...         q, k, v = (layer(x).view(-1, 5, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        ...         y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        ...         return self.out(y.transpose(1, 2).flatten(2))
        >>> model = graphopt.capture(Attention().eval(), (torch.randn(1, 5, 8),))
        >>> wide, _ = graphopt.run(model, "expand-head-size{to=6}")
        >>> [list(wide.params[name].shape) for name in ("q.weight", "v.weight", "out.weight")]
        [[8, 8], [12, 8], [8, 12]]
    """

    name: ClassVar[str] = "expand-head-size"
    contract: ClassVar[Contract] = Contract.EXACT
    part: ClassVar[Part] = "head-size"
