"""Operators that only move data: every output element is an element of an input, or a fill value."""

from __future__ import annotations

from graphopt.ops import literals
from graphopt.ops.axes import Moved
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]

VIEWS = """
    view_as reshape_as expand_as permute transpose.int t numpy_T mT flatten.using_ints squeeze squeeze.dim
    squeeze.dims unsqueeze select.int slice.Tensor narrow split.Tensor chunk unbind.int tensor_split.sections
    tensor_split.indices hsplit.int hsplit.array vsplit.int vsplit.array dsplit.int dsplit.array movedim.int
    movedim.intlist moveaxis.int moveaxis.intlist swapaxes swapdims diagonal unfold alias detach ravel
    contiguous atleast_1d atleast_2d atleast_3d unsafe_split.Tensor unsafe_chunk
"""
COPIES = """
    clone lift_fresh_copy detach_copy alias_copy permute_copy transpose_copy.int t_copy squeeze_copy
    squeeze_copy.dim squeeze_copy.dims unsqueeze_copy select_copy.int slice_copy.Tensor narrow_copy
    unbind_copy.int split_copy.Tensor diagonal_copy unfold_copy flip fliplr flipud roll rot90 repeat tile
    repeat_interleave.self_int im2col constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d tril triu diag diag_embed diagflat
"""
JOINS = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag meshgrid
    meshgrid.indexing broadcast_tensors
"""
SCATTERS = "select_scatter slice_scatter diagonal_scatter"


def movement(values: tuple[str, ...] = ("self",), *, view: bool = False) -> OpInfo:
    return OpInfo(Kind.MOVEMENT, Moved(values), view=view)


def sized(argument: str, *, view: bool = True) -> OpInfo:
    """A movement with a list of output sizes."""
    return OpInfo(Kind.MOVEMENT, Moved(), view=view, literals=literals.output_sizes(argument))


def grouped(argument: str, axis: int, power: int = 1) -> OpInfo:
    """A movement with a factor of the size of an axis."""
    return OpInfo(Kind.MOVEMENT, Moved(), literals=literals.channel_groups(argument, "self", axis, power))


def split(argument: str, *, view: bool = True) -> OpInfo:
    """A movement with a list of lengths along an axis."""
    return OpInfo(Kind.MOVEMENT, Moved(), view=view, literals=literals.split_sizes(argument))


ROWS: dict[str, OpInfo] = {
    **rows(VIEWS, movement(view=True)),
    **rows(COPIES, movement()),
    **rows(JOINS, movement(("tensors",))),
    **rows(SCATTERS, movement(("self", "src"))),
    **rows("view _unsafe_view expand broadcast_to", sized("size")),
    **rows("reshape", sized("shape")),
    **rows("view_copy expand_copy", sized("size", view=False)),
    **rows("unflatten.int", OpInfo(Kind.MOVEMENT, Moved(), view=True, literals=literals.unflatten_sizes)),
    **rows("split_with_sizes unsafe_split_with_sizes", split("split_sizes")),
    **rows("split_with_sizes_copy", split("split_sizes", view=False)),
    **rows("split.sizes", split("split_size")),
    **rows("pixel_shuffle", grouped("upscale_factor", -3, 2)),
    **rows("channel_shuffle native_channel_shuffle", grouped("groups", 1)),
    **rows("pixel_unshuffle", movement()),
}
