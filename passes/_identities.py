"""Which calls return one of their inputs unchanged, operator by operator.

A rule gets a call and the facts about the graph so far. It answers with the input that the call returns, with the
reason why a call that looks like one is left alone, or with None. That shape, dtype and device are those of the
input is checked by the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from graphopt.ops import argument, arguments, lookup, shape
from graphopt.passes._facts import Facts, is_written
from graphopt.passes._reindexing import COPIES, RESHAPES, SPLITS, is_reshape, name_of, permutation
from graphopt.rewriter import Node

__all__ = ["Verdict", "identity"]

Verdict: TypeAlias = Node | str | None
Rule: TypeAlias = Callable[[Node, Facts], Verdict]


def identity(node: Node, facts: Facts) -> Verdict:
    """What `node` returns unchanged, why it only seems to, or None."""
    if permutation(node) is not None:
        return _permutation(node)
    rule = RULES.get(name_of(node))
    return rule(node, facts) if rule is not None else None


def source(node: Node) -> Node:
    """The first argument."""
    first = next(iter(arguments(node).values()))
    assert isinstance(first, Node)
    return first


def _always(node: Node, facts: Facts) -> Verdict:
    return source(node)


def _same_shape(node: Node, facts: Facts) -> Verdict:
    """Operators that cannot return as many elements in the same axes without returning all in order."""
    return source(node) if shape(node) == shape(source(node)) else None


def _reshape(node: Node, facts: Facts) -> Verdict:
    return source(node) if is_reshape(node) and shape(node) == shape(source(node)) else None


def _permutation(node: Node) -> Verdict:
    order = permutation(node)
    return source(node) if order == tuple(range(len(order or ()))) else None


def _copy(node: Node, facts: Facts) -> Verdict:
    if is_written(source(node)):
        return f"'{source(node).target}' is written to, so its copy is another value"
    unknown = [user.name for user in node.users if user.op == "call_function" and lookup(user.target) is None]
    if unknown:
        return f"'{unknown[0]}' is an unknown operator and may rely on the memory layout"
    return source(node)


def _cast(node: Node, facts: Facts) -> Verdict:
    return _copy(node, facts) if facts.same_kind(node, source(node)) else None


def _detach(node: Node, facts: Facts) -> Verdict:
    if facts.carries_gradient(source(node)):
        return f"it stops the gradient to '{source(node).name}'"
    return _copy(node, facts)


def _dropout(node: Node, facts: Facts) -> Verdict:
    return source(node) if not argument(node, "train") or argument(node, "p") == 0 else None


def _padding(node: Node, facts: Facts) -> Verdict:
    widths = [width for name, value in arguments(node).items() if name.startswith("pad") for width in value]
    return source(node) if all(width == 0 for width in widths) else None


def _join(node: Node, facts: Facts) -> Verdict:
    tensors = argument(node, "tensors")
    return tensors[0] if len(tensors) == 1 else None


def _piece(node: Node, facts: Facts) -> Verdict:
    """Piece of a split that has the size of the whole."""
    split = node.all_input_nodes[0]
    return source(split) if name_of(split) in SPLITS and shape(node) == shape(source(split)) else None


def _flip(node: Node, facts: Facts) -> Verdict:
    return source(node) if all(shape(node)[dim] == 1 for dim in argument(node, "dims")) else None


def _roll(node: Node, facts: Facts) -> Verdict:
    shifts, dims = _list(argument(node, "shifts")), _list(argument(node, "dims"))
    if not dims:
        return source(node) if all(shift == 0 for shift in shifts) else None
    sizes = [shape(node)[dim] for dim in dims]
    return source(node) if all(_is_whole_turn(s, n) for s, n in zip(shifts, sizes, strict=True)) else None


def _is_whole_turn(shift: Any, size: Any) -> bool:
    if isinstance(shift, int) and isinstance(size, int):
        return size == 0 or shift % size == 0
    return bool(size == 1 or shift == 0)


def _shuffle(node: Node, facts: Facts) -> Verdict:
    return source(node) if argument(node, "groups") == 1 else None


def _overwrite(node: Node, facts: Facts) -> Verdict:
    written = argument(node, "src")
    return written if isinstance(written, Node) and shape(written) == shape(node) else None


def _add(node: Node, facts: Facts) -> Verdict:
    left, right, alpha = argument(node, "self"), argument(node, "other"), argument(node, "alpha", 1)
    if isinstance(alpha, Node):
        return None
    sign = -1.0 if name_of(node).startswith("sub") else 1.0
    added = facts.uniform(right)
    if added == 0:
        return _without_zero(node, left, sign * added * alpha, facts)
    if sign > 0 and alpha == 1 and facts.uniform(left) == 0:
        return _without_zero(node, right, facts.uniform(left), facts)
    return None


def _without_zero(node: Node, kept: Any, zero: Any, facts: Facts) -> Verdict:
    """x + 0.0 is 0.0 for x = -0.0; x + -0.0 is x, and integers have one zero."""
    if not isinstance(kept, Node) or not facts.same_kind(node, kept):
        return None
    exact = not facts.is_floating(kept) or math.copysign(1.0, zero) < 0
    return kept if exact else facts.unless_zeros_differ(kept)


def _multiply(node: Node, facts: Facts) -> Verdict:
    left, right = argument(node, "self"), argument(node, "other")
    if facts.uniform(right) == 1:
        return left if isinstance(left, Node) else None
    if facts.uniform(left) == 1:
        return right if isinstance(right, Node) else None
    return None


def _divide(node: Node, facts: Facts) -> Verdict:
    return source(node) if facts.uniform(argument(node, "other")) == 1 else None


def _power(node: Node, facts: Facts) -> Verdict:
    return source(node) if argument(node, "exponent") == 1 else None


def _clamp(node: Node, facts: Facts) -> Verdict:
    """Clamping what is within the bounds already."""
    inner, outer = facts.bounds(source(node)), facts.clamped_to(node)
    if inner is None or outer is None:
        return None
    return source(node) if outer[0] <= inner[0] and inner[1] <= outer[1] else None


def _repeated(node: Node, facts: Facts) -> Verdict:
    """f(f(x)) = f(x)."""
    inner = source(node)
    same = inner.op == "call_function" and inner.target is node.target
    return inner if same and arguments(inner) | {"self": None} == arguments(node) | {"self": None} else None


def _undone(node: Node, facts: Facts) -> Verdict:
    """f(f(x)) = x."""
    inner = source(node)
    return source(inner) if inner.op == "call_function" and inner.target is node.target else None


def _max_pool(node: Node, facts: Facts) -> Verdict:
    return source(node) if _unit_window(node) else None


def _average_pool(node: Node, facts: Facts) -> Verdict:
    if not _unit_window(node) or arguments(node).get("divisor_override") not in (None, 1):
        return None
    return facts.unless_zeros_differ(source(node))


def _adaptive_pool(node: Node, facts: Facts) -> Verdict:
    """Every window is one element when there are as many windows as elements."""
    return facts.unless_zeros_differ(source(node)) if shape(node) == shape(source(node)) else None


def _unit_window(node: Node) -> bool:
    kernel, stride, padding = (_list(argument(node, name)) for name in ("kernel_size", "stride", "padding"))
    return all(k == 1 for k in kernel) and all(s == 1 for s in stride or kernel) and all(p == 0 for p in padding)


def _resample_nearest(node: Node, facts: Facts) -> Verdict:
    """The same size is not enough: a factor of 1.1 keeps a size of 5 and yet repeats elements."""
    factors = [
        factor
        for name, value in arguments(node).items()
        if name.startswith("scale")
        for factor in _list(value)
        if factor is not None
    ]
    same = shape(node) == shape(source(node))
    return source(node) if same and all(factor == 1 for factor in factors) else None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _of(rule: Rule, names: str) -> dict[str, Rule]:
    return {name if "." in name else f"{name}.default": rule for name in names.split()}


RULES: dict[str, Rule] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(COPIES, _copy),
    **_of(_same_shape, "expand expand_as broadcast_to slice.Tensor narrow repeat tile repeat_interleave.self_int"),
    **_of(_same_shape, "pixel_shuffle pixel_unshuffle atleast_1d atleast_2d atleast_3d"),
    **_of(_cast, "to.dtype to.dtype_layout to.device to.other type_as _to_copy"),
    **_of(_detach, "detach detach_copy"),
    **_of(_dropout, "dropout feature_dropout alpha_dropout feature_alpha_dropout"),
    **_of(_padding, "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"),
    **_of(_padding, "replication_pad1d replication_pad2d replication_pad3d"),
    **_of(_join, "cat concat concatenate"),
    "getitem": _piece,
    **_of(_flip, "flip"),
    **_of(_roll, "roll"),
    **_of(_shuffle, "channel_shuffle native_channel_shuffle"),
    **_of(_overwrite, "slice_scatter"),
    **_of(_add, "add.Tensor add.Scalar sub.Tensor sub.Scalar subtract.Tensor subtract.Scalar"),
    **_of(_multiply, "mul.Tensor mul.Scalar multiply.Tensor multiply.Scalar"),
    **_of(_divide, "div.Tensor div.Scalar divide.Tensor divide.Scalar true_divide.Tensor true_divide.Scalar"),
    **_of(_power, "pow.Tensor_Scalar"),
    **_of(_clamp, "relu relu6 hardtanh clamp clamp_min clamp_max clip"),
    **_of(_repeated, "abs floor ceil round trunc"),
    **_of(_undone, "neg negative logical_not bitwise_not"),
    **_of(_max_pool, "max_pool1d max_pool2d max_pool3d"),
    **_of(_average_pool, "avg_pool1d avg_pool2d avg_pool3d"),
    **_of(_adaptive_pool, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_of(_resample_nearest, "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    **_of(_resample_nearest, "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec"),
    **_of(_resample_nearest, "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"),
}
