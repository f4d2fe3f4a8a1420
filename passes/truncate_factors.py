"""Truncation of factors to the rank of their product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.passes._factor_layers import Whole, find_layers
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["TruncateFactors"]

_ROUNDINGS = 16
"""How many roundings of its dtype a product is off by, at most: what is below that is none of it."""


@dataclass(frozen=True)
class TruncateFactors(Pass):
    """Narrow what is between two layers in a row to the rank of their product.

    What:
        Two layers without anything in between act by the product of their matrices alone. Training with `Maestro` or
        `DLRT`, or a penalty, leaves directions in it of next to no strength; with these the value between the layers
        becomes narrower, and both layers smaller. Where even that does not pay, `merge-sequential` makes them one.

    Algebra:
        A [out * taps2, r] and B [r, in * taps1 (+ 1 for a bias)]: A = Q1 R1, B = R2^T Q2^T, R1 R2^T = P diag(s) T^T,
        A' = Q1 P s^1/2 and B' = s^1/2 T^T Q2^T over the s_i > eps s_1. |A B - A' B'| = the largest s_i that goes.

    When it applies:
        To two linear layers, or two convolutions of one number of axes and one group, of which the second alone reads
        the first. Left alone, each with the reason: outputs of the first with other users; something in between;
        weights that are shared, masked or computed, or of different dtypes; a bias of the first where the second pads;
        groups; products that use all directions. `eps`: what is negligible, relative to the largest singular value; by
        default 16 roundings of the weights' dtype (1.9e-6 for float32, and for shorter ones too).

    Safety:
        Exact without an `eps`: what goes is rounding. With one the error of each product is at most eps times its
        largest singular value, and the contract is lossy.

    Cost:
        Two QR decompositions in float64 for each pair, and one singular value decomposition of r x r numbers.

    Source:
        Eckart and Young, 1936.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=False), torch.nn.Linear(5, 6)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[3:].copy_(net[0].weight[:2])
        >>> model = graphopt.capture(net, (torch.randn(1, 8),))
        >>> small, (report,) = graphopt.run(model, "truncate-factors")
        >>> list(small.params["0.weight"].shape), list(small.params["1.weight"].shape)
        ([3, 8], [6, 3])
    """

    name: ClassVar[str] = "truncate-factors"
    contract: ClassVar[Contract] = Contract.EXACT

    eps: float | None = None

    def __post_init__(self) -> None:
        if self.eps is None:
            return
        if not 0 <= self.eps < 1:
            raise UsageError(f"eps of '{self.name}' is {self.eps:g}, it has to be at least 0 and below 1")
        # The option decides what is promised; frozen fields are written like this.
        object.__setattr__(self, "contract", Contract.LOSSY("output error"))

    def run(self, rw: Rewriter) -> None:
        layers = dict(find_layers(rw, factors=True))
        rows = []
        for node, second in layers.items():
            if rw.exhausted:
                break
            if isinstance(second, str):
                rw.skip(node, second)
                continue
            first = layers.get(second.source)
            if first is None:
                _note_between(rw, second, layers)
                continue
            why = first if isinstance(first, str) else _why_not(rw, first, second)
            if why is not None:
                rw.skip(node, why)
            elif isinstance(first, Whole):
                row = self._truncated(rw, first, second)
                rows += [row] if row else []
        rw.findings["layers"] = rows

    def _truncated(self, rw: Rewriter, first: Whole, second: Whole) -> dict[str, Any] | None:
        """Make the pair narrower; what is reported of it, or None where it stays."""
        inner, outer = first.dense(rw).double().flatten(1), second.dense(rw).double()
        bias = rw.tensor(first.bias) if first.bias is not None else None
        if bias is not None:
            inner = torch.cat([inner, bias.double()[:, None]], 1)
        rows = outer.movedim(1, -1)
        if not (torch.isfinite(inner).all() and torch.isfinite(outer).all()):
            rw.skip(second.node, f"weights of '{first.node.name}' or '{second.node.name}' are not finite")
            return None
        a, values, b = _balanced(rows.flatten(0, -2), inner)
        precise = min(torch.finfo(rw.fake(first.weight).dtype).eps, torch.finfo(torch.float32).eps)
        eps = _ROUNDINGS * precise if self.eps is None else self.eps
        rank, width = max(1, int((values > eps * values[0]).sum())), inner.shape[0]
        if rank == width:
            share = float(values[-1] / values[0]) if values[0] else 0.0
            rw.skip(
                second.node, f"all {rank} directions of the product are used, the least is {share:.1e} of the first"
            )
            return None
        a, b, why = a[:, :rank], b[:rank], f"the product of both has {rank} directions, of {width}"
        narrow = a.reshape(*rows.shape[:-1], rank).movedim(-1, 1)
        taps = b if bias is None else b[:, :-1]
        self._store(rw, first, taps.reshape(rank, *first.kernel.weight.shape[1:]), why)
        if first.bias is not None:
            rw.set_tensor(first.bias, b[:, -1].to(rw.params[str(first.bias.target)], copy=True), why)
        self._store(rw, second, narrow, why)
        rw.refresh(first.node)
        rw.refresh(second.node)
        tail = float(values[rank:].max() / values[0]) if rank < len(values) and values[0] else 0.0
        return {"layers": [first.name, second.name], "rank": rank, "of": width, "tail": tail}

    def _store(self, rw: Rewriter, whole: Whole, dense: Tensor, why: str) -> None:
        stored = whole.stored(dense).to(rw.params[str(whole.weight.target)], copy=True)
        rw.set_tensor(whole.weight, stored, why)


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A' [m, k], the singular values [k] of A B, and B' [k, n], with A' B' = A B and equal norms of what belongs
    together."""
    left, r1 = torch.linalg.qr(a)
    right, r2 = torch.linalg.qr(b.T)
    p, values, t = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    root = values.sqrt()
    return left @ (p * root), values, root[:, None] * (t @ right.T)


def _why_not(rw: Rewriter, first: Whole, second: Whole) -> str | None:
    """Why two layers in a row do not act by the product of their matrices, or cannot be changed."""
    one, other = f"'{first.node.name}'", f"'{second.node.name}'"
    if first.embedding:
        return f"{one} looks rows up"
    if len(first.node.users) > 1:
        return f"what {one} makes is read by others too"
    if first.kernel.axes != second.kernel.axes:
        return f"{one} slides along {first.kernel.axes} axes and {other} along {second.kernel.axes}"
    if first.groups != 1 or second.groups != 1:
        return f"{one} or {other} has groups"
    if rw.fake(first.weight).dtype != rw.fake(second.weight).dtype:
        return f"{one} and {other} have weights of different dtypes"
    if first.bias is None:
        return None
    if any(pads != (0, 0) for pads in second.kernel.padding):
        return f"{one} adds a bias, and {other} pads with zeros, which have none"
    if rw.tensor(first.bias) is None:
        return f"the bias of {one} is computed"
    if first.bias.target in rw.params.masks:
        return f"the bias of {one} is masked"
    return rw.why_shared(first.bias, first.node)


def _note_between(rw: Rewriter, second: Whole, layers: dict[Node, Whole | str]) -> None:
    """Say what stands between a layer and the one before it, if that is a single call."""
    source = second.source
    before: Any = source.args[0] if source.op == "call_function" and source.args else None
    if before in layers:
        rw.skip(second.node, f"'{source.name}' stands between '{before.name}' and it")
