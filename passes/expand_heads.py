"""More heads of attention that compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes._expansion_pass import Widening
from graphopt.passes._expansion_sites import Part
from graphopt.transform import Contract

__all__ = ["ExpandHeads"]


@dataclass(frozen=True)
class ExpandHeads(Widening):
    """Add heads to attention, without changing what the model computes.

    What:
        Queries, keys and values get heads of their own, with whatever belongs to a head (a row of a bias table); the
        layer behind attention reads them with weights that are zero. `remove-channels` of what the report names as new
        gives the model back as it was.

    Algebra:
        y = sum over heads h of O_h a_h(x), O_h [out, size], gets a term with O = 0 and queries, keys and values W
        [size, in] drawn from a normal distribution with the deviation of those that exist.

    When it applies:
        To attention of two heads or more, as one operator or written out, with a layer each for queries, keys and
        values or one for all. Where several heads of queries share their keys, as many come with every head of keys,
        and `by` and `to` count those of keys; one head of keys that all heads of queries share stays, and they with it.
        Refused with the reason: statistics over the axis (such as a norm of queries and keys over heads), dropout in
        training mode, weights that make positions in one place and read them in another, what an unknown operator
        touches.
        Options: `by`, how many are added to each group, or `to`, how many there are then (fewer: nothing is done);
        `only` and `leave`, names of groups or of modules that they are in; `init`, `normal` or `copy`, the last again;
        `seed`.

    Safety:
        Exact: sums get terms that are zero times a finite number. Proven on the spot by a run of both models. Run
        twice, `by` adds twice; `to` does nothing the second time.

    Cost:
        Three walks over the graph for each group, two runs of the model.

    Source:
        Gesmundo & Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023, section 3.2.

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
        >>> wide, _ = graphopt.run(model, "expand-heads{by=1}")
        >>> list(wide.params["q.weight"].shape), list(wide.params["out.weight"].shape)
        ([12, 8], [8, 12])
    """

    name: ClassVar[str] = "expand-heads"
    contract: ClassVar[Contract] = Contract.EXACT
    part: ClassVar[Part] = "heads"
