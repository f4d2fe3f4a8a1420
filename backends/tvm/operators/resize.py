"""Interpolation, one axis at a time.

The weights of each axis are not derived here: torch itself resizes the identity matrix along one axis, which gives the
exact matrix [out, in] of the operator, whatever its mode, scale and alignment. Its few non-zero taps become
two small tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax, te

from graphopt.backends.tvm.kernels.fused import ANCHOR
from graphopt.backends.tvm.layout import Ordered, ordered
from graphopt.backends.tvm.registry import Call, Refused, converts, dtype_name, wide

aten = torch.ops.aten


def _resized(call: Call, x: Any, scales: Sequence[float] | None, options: tuple[Any, ...]) -> Any:
    """Resize the last axes of x [N, C, ...] one after the other."""
    dtype = wide(call.dtype)
    known = ordered(x)
    result = Ordered(call.cast(known.value, dtype), known.order)
    sizes, outputs = known.shape[2:], call.shape[2:]
    if not all(isinstance(size, int) for size in [*sizes, *outputs]):
        raise Refused("interpolation of a dynamic size")
    for axis, size in enumerate(sizes):
        matrix = _matrix(call, axis, size, outputs, scales, options, getattr(torch, dtype))
        if matrix.shape[0] != size or not torch.equal(matrix, torch.eye(size, dtype=matrix.dtype)):
            result = _apply(call, result, 2 + axis, matrix)
    return result


def _matrix(
    call: Call,
    axis: int,
    size: int,
    outputs: list[int],
    scales: Sequence[float] | None,
    options: tuple[Any, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix [out, in] of one axis: the operator itself applied to the identity.

    The other axes are 2 long: on images that are 1 wide, torch 2.13 reduces antialiased rows wrongly.
    """
    rank = len(outputs)
    others = [2] * rank
    shape = [*others[:axis], size, *others[axis + 1 :]]
    identity = torch.eye(size, dtype=dtype).reshape(size, 1, *(size if a == axis else 1 for a in range(rank)))
    images = identity.expand(size, 1, *shape).contiguous()
    if scales is None:
        sizes, factors = [*others[:axis], outputs[axis], *others[axis + 1 :]], None
    else:
        sizes, factors = None, [scales[a] if a == axis else 1.0 for a in range(rank)]
    resized = call.node.target(images, sizes, *options, factors)  # type: ignore[operator]  # an operator overload
    for other in reversed([a for a in range(rank) if a != axis]):
        resized = resized.select(2 + other, 0)
    return resized.reshape(size, outputs[axis]).T  # type: ignore[no-any-return]  # torch's operators are untyped


def _apply(call: Call, x: Ordered, axis: int, matrix: torch.Tensor) -> Ordered:
    """Multiply one axis by a sparse matrix [out, in] given by its largest taps per row."""
    taps = max(1, int((matrix != 0).sum(1).max()))
    places = matrix.abs().topk(taps, dim=1).indices.sort(1).values
    weights = matrix.gather(1, places)
    order = x.order
    shape = [len(matrix) if a == axis else x.shape[a] for a in order]
    place = order.index(axis)

    def compute(t: te.Tensor, where: te.Tensor, weight: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, taps), "tap")

        def element(*i: Any) -> Any:
            here = i[place]
            return te.sum(t(*i[:place], where(here, k), *i[place + 1 :]) * weight(here, k), axis=k)

        return te.compute(shape, element, name="resize", attrs={ANCHOR: "reduction"})

    tables = relax.const(places.numpy(), "int64"), relax.const(weights.numpy(), dtype_name(weights.dtype))
    return Ordered(call.compute(compute, x.value, *tables, name="resize", anchor=True), order)


@converts(
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    layout="any",
)
def nearest(call: Call, input: Any, output_size: Any, scale_factors: Any) -> Any:
    return _resized(call, input, scale_factors, ())


@converts(
    aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
    layout="any",
)
def smooth(call: Call, input: Any, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
    return _resized(call, input, scale_factors, (align_corners,))
