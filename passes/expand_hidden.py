"""A wider stream that computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import UsageError
from graphopt.passes._expansion import Draw
from graphopt.passes._expansion_pass import widen
from graphopt.passes._expansion_sites import Part, Site
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["ExpandHidden"]


@dataclass(frozen=True)
class ExpandHidden(Pass):
    """Multiply the width of the stream that residual branches are added to, without changing what the model computes.

    What:
        Every feature of the stream is there `times` times, behind each other as [x, x, ..]; what reads the stream gives
        the copies weights that are zero. Training tells them apart from there on.

    Algebra:
        With E [times d, d], which stacks identities: what makes the stream, W [d, in] and b [d], becomes E W and E b,
        what scales it, g [d], becomes E g, what reads it, W [out, d], becomes [W 0 ..]. A mean over x and one over
        E x are equal, so that a norm gives E norm(x): layer norm and RMS norm need no other weights and no other
        epsilon, whether they are one operator or written out.

    When it applies:
        To groups (see `graphopt groups`) that several branches are added to, or that are normalised over. Other widths
        than multiples are refused for the sake of layer norm: zeros in the place of copies change the mean, and with it
        every feature by another amount than a factor. Refused with the reason: embeddings that are also the weights of
        the head (a copy would have to be zero in one use and not in the other), statistics other than means, groups of
        a group norm or convolution, dropout in training mode, outputs and what an unknown operator touches.
        Options: `times`, the factor; `only` and `leave`, names of groups or of modules that they are in.

    Safety:
        Exact. Proven on the spot by a run of both models. Run twice, it multiplies twice. `remove-channels` of what the
        report names as new gives the model back as it was.

    Cost:
        Three walks over the graph for each group, two runs of the model. What reads and makes the stream becomes as
        many times as large.

    Source:
        Gesmundo & Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023, section 3.5,
        whose zeros and rescaled weights serve RMS norm only; copies as in Chen et al., Net2Net, ICLR 2016.

    Example:
        >>> import torch, graphopt
        >>> linear, norm = torch.nn.Linear, torch.nn.LayerNorm(8)
        >>> net = torch.nn.Sequential(linear(4, 8), norm, linear(8, 2)).eval()
        >>> model = graphopt.capture(net, (torch.randn(1, 4),))
        >>> wide, _ = graphopt.run(model, "expand-hidden{times=2}")
        >>> list(wide.params["1.weight"].shape), list(wide.params["2.weight"].shape)
        ([16], [2, 16])
    """

    name: ClassVar[str] = "expand-hidden"
    contract: ClassVar[Contract] = Contract.EXACT

    times: int = 2
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    def run(self, rw: Rewriter) -> None:
        if self.times < 2:
            raise UsageError(f"times is {self.times}, it has to be at least 2")
        part: Part = "hidden"
        widen(rw, part, self._more, self.only, self.leave, Draw("copy", 0))

    def _more(self, site: Site) -> int:
        return self.times - 1
