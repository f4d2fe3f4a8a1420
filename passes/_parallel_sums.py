"""Sums of layers that read one value, as one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphopt.fake import FakeTensor
from graphopt.ops import argument
from graphopt.passes._kernel import Kernel, Refused
from graphopt.passes._linear import Branch, branch_to, image_sizes
from graphopt.passes._merged_layer import Price, common_path, emit, why_apart, why_not_finite
from graphopt.passes._merging import add
from graphopt.passes._rounds import Note
from graphopt.rewriter import Node, Rewriter

__all__ = ["ADDITIONS", "is_sum", "merge_sum"]

aten = torch.ops.aten

ADDITIONS = (aten.add.Tensor, aten.sub.Tensor, aten.subtract.Tensor)


@dataclass(frozen=True)
class _Term:
    """`factor` times the value of `node`, as `user` reads it, which is what `branch` computes."""

    node: Node
    user: Node
    factor: float
    branch: Branch

    @property
    def kernel(self) -> Kernel:
        kernel = self.branch.kernel
        if self.factor == 1:
            return kernel
        bias = None if kernel.bias is None else kernel.bias * self.factor
        return replace(kernel, weight=kernel.weight * self.factor, bias=bias)

    @property
    def layers(self) -> int:
        return sum(not step.is_free for step in self.branch.steps)


@dataclass(frozen=True)
class _Cluster:
    """Terms that become one kernel."""

    terms: tuple[_Term, ...]
    kernel: Kernel
    cost: float


def is_sum(rw: Rewriter, node: Node) -> bool:
    """Whether a call adds or subtracts two computed values of its own shape and dtype."""
    if node.op != "call_function" or node.target not in ADDITIONS:
        return False
    made = rw.value(node)
    alpha = argument(node, "alpha")
    if not isinstance(made, FakeTensor) or not isinstance(alpha, int | float) or not made.is_floating_point():
        return False
    return all(
        isinstance(operand, Node)
        and operand.op != "get_attr"
        and isinstance(value := rw.value(operand), FakeTensor)
        and value.dtype == made.dtype
        and tuple(map(str, value.shape)) == tuple(map(str, made.shape))
        for operand in (argument(node, "self"), argument(node, "other"))
    )


def merge_sum(rw: Rewriter, root: Node, price: Price, note: Note, axes: int) -> bool:
    """Merge what can be merged of the sum of images on `axes` axes, or of outputs of linear layers where that is 0,
    that ends at `root`; says whether anything was."""
    rank = rw.fake(root).dim()
    if not (rank == axes + 2 if axes else rank > 1) or not isinstance(rw.fake(root).shape[1 if axes else -1], int):
        return False
    terms = _terms(rw, root, axes)
    by_source: dict[Node, list[_Term]] = {}
    for term in terms:
        by_source.setdefault(term.branch.source, []).append(term)
    clusters: list[_Cluster] = []
    for group in by_source.values():
        if len(group) > 1 and any(term.layers for term in group):
            clusters += _clusters(rw, root, group, price, note)
        elif group[0].branch.stopped is not None and len(terms) > 1:
            note(root, f"'{group[0].node.name}': {group[0].branch.stopped}")
    merged = [cluster for cluster in clusters if len(cluster.terms) > 1]
    if not merged:
        return False
    _write(rw, root, terms, merged)
    return True


def _terms(rw: Rewriter, root: Node, axes: int) -> list[_Term]:
    """What is added up, through sums that nothing else reads."""
    found: list[_Term] = []
    stack = [(root, 1.0)]
    while stack:
        node, factor = stack.pop()
        alpha = float(argument(node, "alpha")) * (1 if node.target is aten.add.Tensor else -1)
        for operand, times in ((argument(node, "other"), factor * alpha), (argument(node, "self"), factor)):
            if is_sum(rw, operand) and set(operand.users) == {node}:
                stack.append((operand, times))
            else:
                found.append(_Term(operand, node, times, branch_to(rw, operand, node, axes)))
    return found[::-1]


def _clusters(rw: Rewriter, root: Node, group: Sequence[_Term], price: Price, note: Note) -> list[_Cluster]:
    """The terms of one source in as few kernels as costs no more; the largest come first."""
    clusters: list[_Cluster] = []
    for term in sorted(group, key=lambda term: -term.branch.kernel.macs * bool(term.layers)):
        own = _Cluster((term,), term.kernel, price.of_steps(rw, term.branch.steps))
        for place, cluster in enumerate(clusters):
            joined = _joined(rw, root, cluster, own, price)
            if isinstance(joined, _Cluster):
                clusters[place] = joined
                break
            note(root, f"'{term.node.name}' and '{cluster.terms[0].node.name}': {joined}")
        else:
            clusters.append(own)
    return clusters


def _joined(rw: Rewriter, root: Node, one: _Cluster, other: _Cluster, price: Price) -> _Cluster | str:
    terms = (*one.terms, *other.terms)
    source = terms[0].branch.source
    steps = [step for term in terms for step in term.branch.steps]
    if not any(step.layer is not None for step in steps):
        return "there is no layer among them"
    why = why_apart(rw, steps)
    if why is not None:
        return why
    try:
        kernel = add([one.kernel, other.kernel], image_sizes(rw, source))
    except Refused as error:
        return error.what
    why = why_not_finite(kernel, rw.fake(root).dtype)
    if why is not None:
        return why
    cost, apart = price.of_kernel(rw, kernel, source, root), one.cost + other.cost
    if cost > apart:
        return f"merging {price.takes(cost, apart)}"
    return _Cluster(terms, kernel, cost)


def _write(rw: Rewriter, root: Node, terms: Sequence[_Term], merged: Sequence[_Cluster]) -> None:
    """The sum of the merged layers and of what is left."""
    why = "; ".join(f"merged: {', '.join(term.node.name for term in cluster.terms)}" for cluster in merged)
    total: Node | None = None
    for cluster in merged:
        steps = [step for term in cluster.terms for step in term.branch.steps]
        made = emit(
            rw, cluster.kernel, cluster.terms[0].branch.source, steps, common_path(steps, "merged"), before=root
        )
        total = made if total is None else rw.call(aten.add.Tensor, total, made, before=root)
    taken = {id(term) for cluster in merged for term in cluster.terms}
    assert total is not None
    for term in terms:
        if id(term) not in taken:
            how: dict[str, Any] = {} if term.factor == 1 else {"alpha": term.factor}
            total = rw.call(aten.add.Tensor, total, term.node, before=root, **how)
    rw.replace(root, total, why)
