"""The order in which the axes of a tensor lie in memory, when it is not torch's own.

A value of the graph is a Relax expression in torch's order of axes, or an `Ordered`: an expression in another order.
Convolutions make and take their images channels-last; whatever works element by element keeps the order it meets; a
permutation in the model only changes what the order is called. So the axes are moved, and memory is copied, only
where an operator needs torch's order and does not get it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm_ffi
from tvm import ir, relax, te, tirx

from graphopt.backends.tvm.kernels.fused import ANCHOR

if TYPE_CHECKING:
    from graphopt.backends.tvm.registry import Call

__all__ = [
    "CHANNELS_LAST",
    "Ordered",
    "Padded",
    "arranged",
    "broadcast_ready",
    "common_order",
    "computed",
    "ordered",
    "permuted",
    "plain",
    "reshaped",
    "settled",
    "without_axes",
]

CHANNELS_LAST = (0, 2, 3, 1)
"""[N, C, H, W] stored as [N, H, W, C]."""


@dataclass(frozen=True)
class Ordered:
    """A tensor whose axes lie in another order.

    Attributes:
        value: the Relax expression; its axis i is the tensor's axis `order[i]`.
        order: a permutation.
    """

    value: Any
    order: tuple[int, ...]

    @property
    def shape(self) -> list[Any]:
        """Sizes in torch's order."""
        stored = _sizes(self.value)
        return [stored[self.order.index(axis)] for axis in range(len(self.order))]

    @property
    def dtype(self) -> str:
        return str(self.value.ty.dtype)

    def place(self, axis: int) -> int:
        """Where an axis (negative: counted from the end) lies in memory."""
        return self.order.index(axis % len(self.order))


@dataclass(frozen=True)
class Padded(Ordered):
    """An image [N, C, H, W] with zeros around it, which a convolution need not read: it can look over the border.

    Attributes:
        inner: the image without the zeros.
        before: rows above it, and columns on its left.
    """

    inner: Ordered
    before: tuple[int, int]


def _sizes(value: Any) -> list[Any]:
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in value.ty.shape]


def ordered(value: Any) -> Ordered:
    """Any value as an `Ordered`."""
    return value if isinstance(value, Ordered) else Ordered(value, tuple(range(len(value.ty.shape))))


def settled(value: Ordered) -> Any:
    """The bare expression when its order is torch's."""
    return value.value if value.order == tuple(range(len(value.order))) else value


def permuted(value: Any, axes: Sequence[int]) -> Any:
    """The tensor that torch's `permute(axes)` gives; nothing moves."""
    known = ordered(value)
    return settled(Ordered(known.value, tuple(list(axes).index(axis) for axis in known.order)))


def arranged(call: Call, value: Any, order: Sequence[int]) -> Any:
    """The expression of a tensor stored in this order; its axes are moved if they lie otherwise."""
    known = ordered(value)
    if known.order == tuple(order):
        return known.value
    shape = known.shape
    target = [shape[axis] for axis in order]
    if [axis for axis in known.order if shape[axis] != 1] == [axis for axis in order if shape[axis] != 1]:
        return call.reshape(known.value, target)
    moves = [known.order.index(axis) for axis in order]
    if isinstance(known.value, ir.GenericConst):
        from graphopt.backends.tvm.registry import precomputed

        return precomputed(known.value, lambda tensor: tensor.permute(moves))
    return call.emit(relax.op.permute_dims(known.value, moves))


def plain(call: Call, value: Any) -> Any:
    """The expression of a tensor in torch's order."""
    return arranged(call, value, range(len(value.order))) if isinstance(value, Ordered) else value


def broadcast_ready(call: Call, value: Any, order: Sequence[int]) -> Any:
    """An operand of lower or equal rank as an expression that broadcasts against tensors stored in `order`."""
    known = ordered(value)
    if not known.order:
        return known.value
    missing = len(order) - len(known.order)
    if missing:
        full = call.reshape(plain(call, value), [1] * missing + known.shape)
        return arranged(call, full, order)
    return arranged(call, value, order)


def without_axes(value: Ordered, axes: Sequence[int]) -> tuple[int, ...]:
    """The order of what is left when axes are taken away."""
    kept = [axis for axis in range(len(value.order)) if axis not in axes]
    return tuple(kept.index(axis) for axis in value.order if axis in kept)


def reshaped(call: Call, value: Any, shape: Sequence[Any]) -> Any:
    """The tensor that torch's `reshape` gives; axes are moved only where the order in memory does not allow it.

    The shapes fall into blocks of axes with equal products. A block is cut anew where it lies, once its axes lie side
    by side and in order.
    """
    known = ordered(value)
    blocks = _blocks(known.shape, list(shape))
    if blocks is None:
        return call.reshape(plain(call, value), shape)
    stored = {axis: place for place, axis in enumerate(known.order)}
    blocks.sort(key=lambda block: min((stored[a] for a in block[0] if known.shape[a] != 1), default=-1))
    gathered = arranged(call, known, [axis for before, _ in blocks for axis in before])
    order = [axis for _, after in blocks for axis in after]
    return settled(Ordered(call.reshape(gathered, [shape[axis] for axis in order]), tuple(order)))


def _blocks(before: list[Any], after: list[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Runs of axes of two shapes with equal products; None when they cannot be told apart."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        a, b = (before[i] if left else 1), (after[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while not _equal(a, b):
            if not (isinstance(a, int) and isinstance(b, int)):
                return None
            if a < b and i < len(before) and isinstance(before[i], int):
                a, left, i = a * before[i], [*left, i], i + 1
            elif b < a and j < len(after) and isinstance(after[j], int):
                b, right, j = b * after[j], [*right, j], j + 1
            else:
                return None
        blocks.append((left, right))
    return blocks


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return not isinstance(a, int) and not isinstance(b, int) and bool(tvm_ffi.structural_equal(a, b))


def computed(
    call: Call,
    x: Any,
    shape: Sequence[Any],
    element: Callable[[Callable[..., Any]], Callable[..., Any]],
    name: str,
    *,
    finish: Callable[..., Any] | None = None,
    anchor: bool = False,
) -> Any:
    """A tensor computed from one input of the same rank, made in the order of axes that the input has.

    Args:
        element: given a function that reads x at indices in torch's order, a function from the indices of the result
            (in that order too) to an element.
        finish: a last step, from (element, *indices) to the final element.
        anchor: whether a kernel may do what follows as well.
    """
    known = ordered(x)
    order, rank = known.order, len(known.order)

    def compute(t: te.Tensor) -> te.Tensor:
        read = element(lambda *at: t(*(at[axis] for axis in order)))
        sizes = [shape[axis] for axis in order]

        def logical(at: Sequence[Any]) -> list[Any]:
            return [at[order.index(axis)] for axis in range(rank)]

        notes = {ANCHOR: "reduction"} if anchor else {}
        result = te.compute(sizes, lambda *at: read(*logical(at)), name=name, attrs=notes)
        if finish is None:
            return result
        return te.compute(sizes, lambda *at: finish(result(*at), *logical(at)), name=f"{name}_end")

    return settled(Ordered(call.compute(compute, known.value, name=name, anchor=anchor), order))


def common_order(values: Sequence[Any], rank: int) -> tuple[int, ...] | None:
    """The order to work in: that of the largest operand of full rank, when some operand is not in torch's order."""
    orders = [ordered(v) for v in values if isinstance(v, Ordered) and len(v.order) == rank]
    return max(orders, key=_weight).order if orders else None


def _weight(value: Ordered) -> int:
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else 64
    return total
