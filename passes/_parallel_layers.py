"""Convolutions side by side that read one value, as one wider convolution."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ops import Kind, argument, is_pure, lookup
from graphopt.passes._kernel import Kernel, Refused
from graphopt.passes._linear import Step, image_sizes, is_layer, read_step
from graphopt.passes._merged_layer import Price, emit, why_apart, why_not_finite
from graphopt.passes._merging import compose, stack
from graphopt.passes._pieces import joined_name, why_in_one_piece
from graphopt.passes._rounds import Note
from graphopt.rewriter import Node, Rewriter

__all__ = ["merge_layers"]

aten = torch.ops.aten

_TRAITS = ("dtype", "kind", "precision", "requires_grad")


@dataclass(frozen=True)
class _Member:
    """A convolution, what is computed with it (batch norm, multiplication), and the activation that follows."""

    steps: tuple[Step, ...]
    kernel: Kernel
    activation: Node | None

    @property
    def layer(self) -> Node:
        return self.steps[0].node

    @property
    def output(self) -> Node:
        return self.activation or self.steps[-1].node

    @property
    def weight(self) -> str:
        layer = self.steps[0].layer
        assert layer is not None
        return str(layer.weight.target)


def merge_layers(rw: Rewriter, price: Price, note: Note) -> None:
    """Merge the convolutions of each value, as far as that costs no more."""
    readers: dict[Any, list[Node]] = {}
    for node in rw.find():
        if is_layer(node) and node.target is not aten.linear.default:
            readers.setdefault(argument(node, "input"), []).append(node)
    for nodes in readers.values():
        if rw.exhausted:
            return
        members = []
        for node in nodes if len(nodes) > 1 else ():
            member = _member(rw, node)
            if isinstance(member, str):
                note(node, member)
            else:
                members.append(member)
        for cluster in _clusters(rw, members, price, note):
            if len(cluster) > 1:
                _write(rw, cluster)


def _member(rw: Rewriter, node: Node) -> _Member | str:
    axes = rw.fake(node).dim() - 2
    step = read_step(rw, node, axes)
    if not isinstance(step, Step):
        return step or f"'{node.name}' is no convolution"
    steps, kernel = [step], step.kernel
    while (user := _sole_user(steps[-1].node)) is not None:
        step = read_step(rw, user, axes)
        if not isinstance(step, Step) or not step.is_free or not step.kernel.is_pointwise:
            break
        steps.append(step)
        kernel = compose(kernel, step.kernel)
    member = _Member(tuple(steps), kernel, _activation(steps[-1].node))
    return why_in_one_piece(member.output) or member


def _sole_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: Node) -> Node | None:
    """The call that takes every element of a value by itself, and is all that reads it."""
    user = _sole_user(node)
    if user is None or user.op != "call_function":
        return None
    info = lookup(user.target)
    fits = info is not None and info.kind is Kind.ELEMENTWISE and is_pure(user) and user.all_input_nodes == [node]
    return user if fits and user.args[:1] == (node,) and user.args.count(node) == 1 else None


def _same_activation(one: _Member, other: _Member) -> bool:
    a, b = one.activation, other.activation
    if a is None or b is None:
        return a is b
    return a.target is b.target and a.args[1:] == b.args[1:] and a.kwargs == b.kwargs


def _clusters(rw: Rewriter, members: Sequence[_Member], price: Price, note: Note) -> list[list[_Member]]:
    """The layers of one value in as few as cost no more."""
    clusters: list[list[_Member]] = []
    for member in members:
        for place, cluster in enumerate(clusters):
            joined = _joined(rw, cluster, member, price)
            if not isinstance(joined, str):
                clusters[place] = joined
                break
            note(member.layer, f"beside '{cluster[0].layer.name}': {joined}")
        else:
            clusters.append([member])
    return clusters


def _joined(rw: Rewriter, cluster: Sequence[_Member], member: _Member, price: Price) -> list[_Member] | str:
    members = [*cluster, member]
    steps = [step for one in members for step in one.steps]
    alike = all(_same_activation(one, member) for one in cluster)
    if not alike and price.table is None:
        return "another activation follows, so the outputs would be split before it"
    why = why_apart(rw, steps, _TRAITS)
    if why is not None:
        return why
    source = member.steps[0].source
    try:
        kernel = stack([one.kernel.meta() for one in members], image_sizes(rw, source))
    except Refused as error:
        return error.what
    apart = price.of_steps(rw, steps)
    together = price.of_kernel(rw, kernel, source, member.layer)
    if not alike or _place_in_concatenation(members) is None:
        together += price.of_split(rw, member.layer, [one.kernel.outputs for one in members])
    if together > apart:
        return f"merging {price.takes(together, apart)}"
    return next(filter(None, (why_not_finite(one.kernel, rw.fake(one.layer).dtype) for one in members)), members)


def _place_in_concatenation(members: Sequence[_Member]) -> tuple[Node, int] | None:
    """The concatenation of channels that alone reads the outputs, next to each other in any order, and where."""
    cat = _sole_user(members[0].output)
    if (
        cat is None
        or cat.target is not aten.cat.default
        or argument(cat, "dim") % members[0].output.meta["val"].dim() != 1
    ):
        return None
    tensors = list(argument(cat, "tensors"))
    if any(_sole_user(one.output) is not cat or tensors.count(one.output) != 1 for one in members):
        return None
    places = sorted(tensors.index(one.output) for one in members)
    return (cat, places[0]) if places[-1] - places[0] == len(members) - 1 else None


def _write(rw: Rewriter, cluster: Sequence[_Member]) -> None:
    first, why = cluster[0].layer, f"merged: {', '.join(one.layer.name for one in cluster)}"
    place, members = _place_in_concatenation(cluster), list(cluster)
    if place is not None:
        tensors = list(argument(place[0], "tensors"))
        members.sort(key=lambda one: tensors.index(one.output))
    source, steps = members[0].steps[0].source, [step for one in members for step in one.steps]
    kernel = stack([one.kernel for one in members], image_sizes(rw, source))
    merged = emit(rw, kernel, source, steps, joined_name([one.weight for one in members]), before=first)
    hoisted = all(_same_activation(members[0], one) for one in members)
    if hoisted and (call := members[0].activation) is not None:
        merged = rw.call(call.target, merged, *call.args[1:], before=first, like=call, **call.kwargs)
    old = [one.output if hoisted else one.steps[-1].node for one in members]
    if place is not None and hoisted:
        _put(rw, place, len(members), merged, why)
        return
    sizes = [one.kernel.outputs for one in members]
    pieces = rw.call(aten.split_with_sizes.default, merged, sizes, 1, before=first, like=first)
    outputs = [rw.call(operator.getitem, pieces, i, before=first, like=node) for i, node in enumerate(old)]
    for node, output in zip(old, outputs, strict=True):
        rw.replace(node, output, why)


def _put(rw: Rewriter, place: tuple[Node, int], count: int, merged: Node, why: str) -> None:
    """The merged output in a concatenation, instead of its pieces."""
    cat, at = place
    tensors = list(argument(cat, "tensors"))
    tensors[at : at + count] = [merged]
    if len(tensors) == 1:
        rw.replace(cat, merged, why)
    else:
        rw.update(cat, why, tensors=tensors)
