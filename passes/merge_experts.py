"""Mixtures of experts get fewer experts: those that are used for the same things are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.check import Oracle
from graphopt.errors import UsageError
from graphopt.names import nearest
from graphopt.passes._expert_products import computed_stacks
from graphopt.passes._expert_stacks import indexed_stacks, report_unsupported
from graphopt.passes._expert_sums import weighted_sums
from graphopt.passes._experts import Aligned, average, groups_of
from graphopt.passes._mixtures import Mixture, Statistics, find_hidden, observe_routing
from graphopt.passes._output_error import OutputError
from graphopt.rewriter import Rewriter
from graphopt.space import Range, Space
from graphopt.transform import Contract, Pass

__all__ = ["MergeExperts"]


@dataclass(frozen=True)
class MergeExperts(Pass):
    """Merge the experts of mixtures until a number of them is left.

    What:
        The most used experts of a layer stay; each other one joins the one that the router treats most alike. Hidden
        units are brought into one order, weights are averaged by usage, and the router's weights of all that have been
        merged go to what they have become.

    Algebra:
        y = sum over e of g_e f_e(x) becomes y = sum over groups G of (sum over e in G of g_e) f_G(x). Experts i and j
        are alike by cos(l_i, l_j), l [tokens, experts] the router's logits. The weights of f_G, W [out, in], are
        sum u_e W_e P_e / sum u_e, u_e how often e is selected (where all are computed, the sum of its g), P_e the
        permutation of hidden units that makes the inner product with the weights of the most used one largest.

    When it applies:
        To sums in which every expert is computed and multiplied with its column of the gates, whatever the gates are
        made of (a softmax, a mask of the largest); to stacked experts [experts, ...] that are taken by the indices that
        a router selects, as in transformers with experts_implementation='batched_mm'; and to stacked experts that are
        all computed by products, and weighted by gates [..., experts] in another one. Experts have to be built
        alike, and of their own parts alone. Everything else is refused with the reason: kernels for sorted experts,
        weights that are shared or masked, results that are used otherwise, numbers that count the experts. The model
        has to be in evaluation mode.
        Options: `experts`, how many are left in each layer; `importance`, by which experts are kept: `frequency`;
        `align`, whether hidden units are brought into one order; `only` and `leave`, names of layers or of modules that
        they are in.

    Safety:
        Lossy; exact where experts are equal but for the order of their hidden units. Proven on the spot: the result
        computes what the original does with the merged weights in the place of each expert's own, within the rounding
        of float, or the pass fails. Where hidden units lie is found by trying, on the first batch: another order of all
        of them may change nothing, that of one side alone has to. Needs calibration data.

    Cost:
        Two runs over the calibration data, of which sums are kept; an assignment of hidden units, cubic in their
        number, for each expert that goes.

    Source:
        Li et al., Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, ICLR 2024;
        Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023.

    Example:
        >>> import torch, graphopt
        >>> linear = torch.nn.Linear
        >>> class Mixture(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         experts = [torch.nn.Sequential(linear(8, 16), torch.nn.GELU(), linear(16, 8)) for _ in range(4)]
        ...         self.gate, self.experts = linear(8, 4), torch.nn.ModuleList(experts)
        ...     def forward(self, x):
        ...         gates = self.gate(x).softmax(-1)
        ...         return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        >>> model = graphopt.capture(Mixture().eval(), (torch.randn(6, 8),))
        >>> small, (report,) = graphopt.run(model, "merge-experts{experts=2}", calib=[[torch.randn(6, 8)]])
        >>> report.findings["layers"][0]["before"], report.findings["layers"][0]["after"]
        (4, 2)
    """

    name: ClassVar[str] = "merge-experts"
    contract: ClassVar[Contract] = Contract.LOSSY("output error on calibration data")
    space: ClassVar[Space | None] = Space(budgets={"experts": Range(1, 8, whole=True)}, place=0.3)

    experts: int
    importance: Literal["frequency"] = "frequency"
    align: bool = True
    only: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    def run(self, rw: Rewriter) -> None:
        self._check(rw)
        found = [*weighted_sums(rw), *indexed_stacks(rw), *computed_stacks(rw)]
        report_unsupported(rw)
        mixtures = self._named(found)
        merged = []
        for mixture, statistics in zip(mixtures, observe_routing(rw, mixtures) if mixtures else [], strict=True):
            aligned = self._aligned(rw, mixture, statistics)
            if aligned is not None:
                merged.append((mixture, statistics, aligned))
        error = OutputError(rw.model, rw.calib) if merged else None
        _merge(rw, [(mixture, aligned) for mixture, _, aligned in merged])
        rw.findings |= {
            "layers": [_row(*one) for one in merged],
            "output error": error.of(rw.model) if error else 0.0,
        }

    def _check(self, rw: Rewriter) -> None:
        if self.experts < 1:
            raise UsageError(f"experts is {self.experts}, it has to be at least 1")
        if not rw.calib:
            raise UsageError(
                "it needs calibration data, to see how the router uses the experts",
                todo="give some: calib= in Python, --calib DATA.npz on the command line",
            )
        if rw.model.mode == "train":
            raise UsageError(
                "it needs a model in evaluation mode", todo="call eval() on the model first, and train() on the result"
            )

    def _named(self, mixtures: Sequence[Mixture]) -> list[Mixture]:
        def meant(name: str) -> set[str]:
            found = {one.name for one in mixtures if one.name == name or one.name.startswith(f"{name}.")}
            if not found:
                known = [one.name for one in mixtures]
                todo = nearest(name, known) if known else "leave the option out: the model has no mixture of experts"
                raise UsageError(f"no mixture of experts is called '{name}'", todo=todo)
            return found

        wanted = {one for name in self.only for one in meant(name)} or {one.name for one in mixtures}
        left = {one for name in self.leave for one in meant(name)}
        return [one for one in mixtures if one.name in wanted - left]

    def _aligned(self, rw: Rewriter, mixture: Mixture, statistics: Statistics) -> Aligned | None:
        """What the experts of a layer become; None where they stay."""
        if mixture.count <= self.experts:
            rw.skip(mixture.at, f"'{mixture.name}' has {mixture.count} experts already")
            return None
        if not bool(statistics.usage.isfinite().all()) or not bool(statistics.gram.isfinite().all()):
            rw.skip(mixture.at, f"'{mixture.name}' stays: what its router makes of the calibration data is not finite")
            return None
        hidden = find_hidden(rw, mixture) if self.align else None
        if self.align and hidden is None:
            why = (
                "it could not be told where the hidden units of its experts are; align=false averages them as they are"
            )
            rw.skip(mixture.at, f"'{mixture.name}' stays: {why}")
            return None
        experts, usage = mixture.experts(rw.model), statistics.usage.tolist()
        groups = groups_of(statistics.usage, statistics.similarity, self.experts)
        made = [average([experts[e] for e in group], [usage[e] for e in group], hidden) for group in groups]
        return Aligned(groups, tuple(made))


def _merge(rw: Rewriter, merged: Sequence[tuple[Mixture, Aligned]]) -> None:
    """Merge, and prove that every expert has become what it should."""
    if not merged:
        return
    full = rw.model.clone(share_tensors=True)
    for mixture, aligned in merged:
        every = [aligned.merged[place] for place in aligned.place(mixture.count)]
        for name, tensor in mixture.with_experts(rw.model, every).items():
            full.params.set(name, tensor)
    oracle = Oracle(full, rw.calib[:1])
    for mixture, aligned in merged:
        mixture.merge(rw, aligned)
    rw.model.touch()
    oracle.judge(rw.model, Contract.EXACT)


def _row(mixture: Mixture, statistics: Statistics, aligned: Aligned) -> dict[str, Any]:
    total = float(statistics.usage.sum()) or 1.0
    return {
        "layer": mixture.name,
        "before": mixture.count,
        "after": len(aligned.groups),
        "groups": [list(group) for group in aligned.groups],
        "usage": [float(one) / total for one in statistics.usage],
    }
