"""Larger queries and keys that compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes._expansion_pass import Widening
from graphopt.passes._expansion_sites import Part
from graphopt.transform import Contract

__all__ = ["ExpandAttention"]


@dataclass(frozen=True)
class ExpandAttention(Widening):
    """Add features to the queries and keys of every head of attention, without changing what the model computes.

    What:
        Every head of queries and keys gets more features, those of keys zero. What turns features by angles (rotary
        embeddings) counts in pairs, and a new pair is turned like the last one. Where one layer makes queries, keys and
        values as one box [3, heads, size], values grow along, as `expand-head-size` lets them. `remove-channels` of
        what the report names as new gives the model back as it was.

    Algebra:
        Q K^T / s with Q [L, size] and K [S, size] becomes [Q N] [K 0]^T / s, N drawn from a normal distribution with
        the deviation of the weights of Q. s stays what it was: where it follows from the size, as it does in
        scaled_dot_product_attention, sqrt(size) is written down, so that no key has to be rescaled by sqrt((size + new)
        / size) as in the paper.

    When it applies:
        To attention of two features a head or more, as one operator or written out. One layer for queries and keys has
        to keep them in rows of their own. Refused with the reason: statistics over the axis (such as a norm of queries
        and keys), dropout in training mode, weights that make positions in one place and read them in another, what an
        unknown operator touches.
        Options: `by`, how many are added to every head, or `to`, how many there are then (fewer: nothing is done);
        `only` and `leave`, names of groups or of modules that they are in; `init`, `normal` or `copy`, the last again;
        `seed`.

    Safety:
        Exact: sums get terms that are zero times a finite number. Proven on the spot by a run of both models. Run
        twice, `by` adds twice; `to` does nothing the second time.

    Cost:
        Three walks over the graph for each group, two runs of the model.

    Source:
        Gesmundo & Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023, section 3.4.

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
        >>> wide, _ = graphopt.run(model, "expand-attention{by=2}")
        >>> [list(wide.params[name].shape) for name in ("q.weight", "k.weight", "v.weight")]
        [[12, 8], [12, 8], [8, 8]]
        >>> wide.params["k.weight"][4:6].abs().max().item()
        0.0
    """

    name: ClassVar[str] = "expand-attention"
    contract: ClassVar[Contract] = Contract.EXACT
    part: ClassVar[Part] = "attention"
