"""Wider hidden layers that compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes._expansion_pass import Widening
from graphopt.passes._expansion_sites import Part
from graphopt.transform import Contract

__all__ = ["ExpandMlp"]


@dataclass(frozen=True)
class ExpandMlp(Widening):
    """Add hidden units to MLPs, without changing what the model computes.

    What:
        The layers in front of a hidden axis (one, or two in a gated MLP) make more features, the ones behind it read
        them with weights that are zero. Training can use them from there on. `remove-channels` of what the report
        names as new gives the model back as it was.

    Algebra:
        y = W2 f(W1 x), W1 [hidden, in], W2 [out, hidden], becomes [W2 0] f([W1; N] x) with N [new, in] drawn from a
        normal distribution with the deviation of W1. The gradient by the zeros is that by any weight; the one by N is
        zero in the first step, and is not after it.

    When it applies:
        To hidden axes whose positions are followed from the layers that make them to those that read them (see
        `graphopt groups`), linear ones and convolutions, that are neither attention nor the stream to which residual
        branches are added. Refused: statistics or functions over the whole axis (a norm or a softmax over it), dropout
        and batch norms in training mode, grouped convolutions, permutations that would mix what is new with the rest,
        weights that make positions in one place and read them in another, outputs and what an unknown operator touches.
        Options: `by`, how many units are added, or `to`, how many there are then (fewer: nothing is done); `only` and
        `leave`, names of groups or of modules that they are in; `init`, `normal` or `copy`, the last unit again;
        `seed`.

    Safety:
        Exact: sums get terms that are zero times a finite number. Proven on the spot by a run of both models: with
        `normal`, a function that is not finite everywhere (a logarithm) may fail there; with `copy` it does not.
        Run twice, `by` adds twice; `to` does nothing the second time.

    Cost:
        Three walks over the graph for each group, two runs of the model. The model is slower by what is added.

    Source:
        Gesmundo & Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023, section 3.1;
        Chen et al., Net2Net, ICLR 2016, for copies.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).eval()
        >>> model = graphopt.capture(net, (torch.randn(1, 4),))
        >>> wide, (report,) = graphopt.run(model, "expand-mlp{to=10}")
        >>> list(wide.params["0.weight"].shape), report.findings["groups"][0]["new"]
        ([10, 4], {'0': [8, 9]})
        >>> back, _ = graphopt.run(wide, "remove-channels{layer=0,indices=8;9}")
        >>> torch.equal(back.params["2.weight"], net[2].weight)
        True
    """

    name: ClassVar[str] = "expand-mlp"
    contract: ClassVar[Contract] = Contract.EXACT
    part: ClassVar[Part] = "mlp"
