"""Products of tensors, in terms of the letters of their Einstein equation, and attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from graphopt.analysis.labels.atoms import Labels, collapse, compact, uniform, varies
from graphopt.analysis.labels.elementwise import combined
from graphopt.ops import OpInfo, Product, argument, equation, operands

if TYPE_CHECKING:
    from graphopt.analysis.labels.trace import Trace, Traced

__all__ = ["product"]


@dataclass(frozen=True)
class Terms:
    """The letters of two operands and of their product, every axis with one; `size` is of each letter."""

    left: str
    right: str
    out: str
    size: dict[str, int]

    @classmethod
    def of(cls, text: str, left: tuple[int, ...], right: tuple[int, ...]) -> Terms | None:
        """None where a letter stands twice in a term, or in one operand only and not in the product."""
        before, out = text.split("->") if "->" in text else (text, "")
        if "->" not in text or before.count(",") != 1:
            return None
        terms, free = before.split(","), 0
        shapes = (left, right)
        for term, shape in zip(terms, shapes, strict=True):
            free = max(free, len(shape) - len(term.replace("...", "")))
        dots = "".join(chr(0x4E00 + i) for i in range(free))  # letters that no equation has
        spelled = []
        for term, shape in zip(terms, shapes, strict=True):
            mine = len(shape) - len(term.replace("...", ""))
            spelled.append(term.replace("...", dots[free - mine :]))
        result = out.replace("...", dots)
        if any(len(set(term)) != len(term) for term in (*spelled, result)):
            return None
        lost = (set(spelled[0]) ^ set(spelled[1])) - set(result)
        if lost:
            return None
        size: dict[str, int] = {}
        for term, shape in zip(spelled, shapes, strict=True):
            for letter, number in zip(term, shape, strict=True):
                size[letter] = max(size.get(letter, 1), number)
        return cls(spelled[0], spelled[1], result, size)

    @property
    def batch(self) -> str:
        return "".join(x for x in self.out if x in self.left and x in self.right)

    @property
    def inner(self) -> str:
        return "".join(x for x in self.left if x in self.right and x not in self.out)

    def free(self, term: str) -> str:
        """Letters of a term that the other one lacks."""
        return "".join(x for x in term if x not in self.batch + self.inner)


def product(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """A product with a stored tensor is a layer; one of two activations meets along the letters they share."""
    axes = info.axes
    assert isinstance(axes, Product)
    if str(node.target) == "aten.scaled_dot_product_attention.default":
        return _attention(trace, node)
    nodes = operands(node)
    if len(nodes) != 2:
        return trace.barrier(node, "multiplies more than two tensors")
    terms = Terms.of(equation(node), trace.sizes(nodes[0]), trace.sizes(nodes[1]))
    if terms is None:
        return trace.barrier(node, "is a product of a kind that is not followed")
    stored = [trace.stored(one) for one in nodes]
    if stored[0] is not None and stored[1] is not None:
        return trace.barrier(node, "multiplies two stored tensors")
    if stored[1] is not None:
        made = _layer(trace, node, terms, nodes[0], terms.left, terms.right, stored[1])
    elif stored[0] is not None:
        made = _layer(trace, node, terms, nodes[1], terms.right, terms.left, stored[0])
    else:
        made = _pair(trace, node, terms, trace.of(nodes[0]), trace.of(nodes[1]))
    if axes.added is not None:
        added = argument(node, axes.added)
        made = combined(trace, node, [made, trace.of(added)], trace.sizes(node))
    return made


def _layer(
    trace: Trace, node: Node, terms: Terms, source: Node, term: str, own: str, stored: tuple[Node, tuple[int, ...]]
) -> Labels:
    """A product of an activation with letters `term` and a stored tensor with letters `own`."""
    labels = trace.of(source)
    changing = [letter for axis, letter in enumerate(term) if varies(labels, (axis,))]
    inner = [letter for letter in changing if letter in terms.inner]
    carried = changing and not inner
    if len(inner) > 1 or (carried and any(letter in own for letter in changing)):
        why = "is multiplied along several axes with positions of their own"
        trace.atoms.pin(labels, node, why)
        labels, inner, carried = uniform(trace.atoms.pinned(node, why), labels.shape), [], False
    makes = [letter for letter in terms.free(own) if terms.size[letter] > 1]
    slots: dict[str, Labels] = {}
    if inner:
        slots[inner[0]] = trace.atoms.tie_along(labels, term.index(inner[0]))
    if not carried and len(makes) == 1:
        slots[makes[0]] = trace.made(node, terms.size[makes[0]])
    for axis, letter in enumerate(own):
        if letter in slots:
            trace.slot(stored, axis, slots[letter], "out" if letter in makes else "in", node)
        else:
            trace.keep_axis(stored, axis, node, "has no positions along it that could be removed")
    sizes = [terms.size[letter] for letter in terms.out]
    if carried:
        return _spelled(collapse(labels, [term.index(x) for x in terms.inner]), term, terms.out).expand(sizes)
    if len(makes) == 1:
        return slots[makes[0]].reshape([-1 if letter == makes[0] else 1 for letter in terms.out]).expand(sizes)
    return uniform(trace.atoms.pinned(node, "makes several axes at once"), sizes)


def _spelled(labels: Labels, term: str, order: str) -> Labels:
    """Labels with axes in the order of the letters; of size one for a letter that the term lacks."""
    thin = labels.permute([term.index(letter) for letter in order if letter in term] + _missing(term, order))
    thin = thin.reshape(thin.shape[: sum(letter in term for letter in order)])
    shape, sizes = [], iter(thin.shape)
    for letter in order:
        shape.append(next(sizes) if letter in term else 1)
    return thin.reshape(shape)


def _missing(term: str, order: str) -> list[int]:
    """Axes of a term that the order leaves out; their size is one."""
    return [axis for axis, letter in enumerate(term) if letter not in order]


def _pair(trace: Trace, node: Node, terms: Terms, left: Labels, right: Labels) -> Labels:
    """Two activations: what is summed over is tied across both; every position of the batch is a product by itself."""
    rows, columns = terms.free(terms.left), terms.free(terms.right)
    a = _spelled(left, terms.left, terms.batch + rows + terms.inner)
    b = _spelled(right, terms.right, terms.batch + columns + terms.inner)
    batch = [terms.size[x] for x in terms.batch]
    changing = [varies(a, (axis,)) or varies(b, (axis,)) for axis in range(len(batch))]
    kept = [size if change else 1 for size, change in zip(batch, changing, strict=True)]
    still = [axis for axis, change in enumerate(changing) if not change]
    count = math.prod(kept)
    a3 = _cubed(collapse(a, still), kept, [terms.size[x] for x in rows], [terms.size[x] for x in terms.inner])
    b3 = _cubed(collapse(b, still), kept, [terms.size[x] for x in columns], [terms.size[x] for x in terms.inner])
    if varies(a3, (2,)) or varies(b3, (2,)):
        made = _meeting(trace, node, a3, b3).reshape(count, 1, 1)
    else:
        made = _outer(trace, node, collapse(a3, (2,))[..., 0], collapse(b3, (2,))[..., 0])
    made = made.expand(count, max(a3.shape[1], 1), b3.shape[1])
    wide = made.reshape(*kept, *(terms.size[x] for x in rows), *(terms.size[x] for x in columns))
    order = terms.batch + rows + columns
    return wide.permute([order.index(x) for x in terms.out]).expand([terms.size[x] for x in terms.out])


def _cubed(labels: Labels, batch: list[int], free: list[int], inner: list[int]) -> Labels:
    """[batch, free, inner]."""
    return labels.expand(*batch, *free, *inner).reshape(math.prod(batch), math.prod(free), math.prod(inner))


def _meeting(trace: Trace, node: Node, a: Labels, b: Labels) -> Labels:
    """a [batch, rows, inner] and b [batch, columns, inner] meet along `inner`; labels of the product, [batch]."""
    first, second = collapse(a, (1,)), collapse(b, (1,))
    trace.atoms.tie(a, first)
    trace.atoms.tie(b, second)
    trace.atoms.tie(first, second)
    count = a.shape[0]
    if count == 1:
        return uniform(0, (1,))
    marks = trace.atoms.fresh(count)
    trace.add_link(node, [first[:, 0], second[:, 0]], [marks])
    return marks


def _outer(trace: Trace, node: Node, a: Labels, b: Labels) -> Labels:
    """a [batch, rows] and b [batch, columns], nothing to remove between them: their positions pass."""
    if varies(a, (1,)) and varies(b, (1,)):
        trace.atoms.pin(a, node, "has positions beside those of the other factor")
        a = uniform(trace.atoms.pinned(node, "has positions beside those of the other factor"), a.shape)
    main, side = (b, a) if varies(b, (1,)) or not varies(a, (1,)) else (a, b)
    rows = collapse(side, (1,))[:, 0]
    if main.shape[0] > 1:
        trace.add_link(node, [main], [rows])
    elif bool((compact(rows) > 0).any()):
        trace.atoms.pin(rows, node, "is the only position there")
    return main[:, None, :] if main is b else main[:, :, None]


def _attention(trace: Trace, node: Node) -> Labels:
    """query [..., L, E], key [..., S, E], value [..., S, V]: features of query and key go together; so do heads."""
    query, key, value = (trace.of(argument(node, name)) for name in ("query", "key", "value"))
    shape = trace.sizes(node)
    if argument(node, "enable_gqa", False):
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    rank = len(shape)
    batch = [one.expand(*shape[:-2], *one.shape[-2:]) for one in (query, key, value)]
    still = [axis for axis in range(rank - 2) if not any(varies(one, (axis,)) for one in batch)]
    thin = [collapse(one, still) for one in batch]
    heads = [size if axis not in still else 1 for axis, size in enumerate(shape[:-2])]
    count = math.prod(heads)
    at = []
    for one in thin:
        features = collapse(one, (rank - 2,))
        trace.atoms.tie(one, features)
        at.append(features.reshape(count, -1))
    trace.atoms.tie(at[0], at[1])
    marks = trace.atoms.fresh(count) if count > 1 else uniform(0, (1,))
    if count > 1:
        trace.add_link(node, at, [marks])
    mask = argument(node, "attn_mask", None)
    if mask is not None:
        scores = (*shape[:-1], trace.sizes(argument(node, "key"))[-2])
        combined(trace, node, [marks.reshape(*heads, 1, 1).expand(scores), trace.of(mask)], scores)
    return at[2].reshape(*heads, 1, -1).expand(shape)
