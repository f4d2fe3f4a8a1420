"""Operators that read or write at positions given by a tensor of indices."""

from __future__ import annotations

from graphopt.ops.axes import Broadcast, Indexed, Opaque
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]


def indexing(axes: Indexed, work: int = 0) -> OpInfo:
    return OpInfo(Kind.INDEXING, axes, work=work)


ROWS: dict[str, OpInfo] = {
    **rows("embedding", indexing(Indexed("weight", "indices", dim=None, axis=0))),
    **rows("index_select gather", indexing(Indexed())),
    **rows("take_along_dim", indexing(Indexed(indices="indices"))),
    **rows("index.Tensor", indexing(Indexed(indices="indices", dim=None))),
    **rows("scatter.src", indexing(Indexed(values="src"))),
    **rows("scatter.value", indexing(Indexed(values="value"))),
    **rows("scatter_add scatter_reduce.two", indexing(Indexed(values="src"), work=1)),
    **rows("index_add", indexing(Indexed(values="source"), work=1)),
    **rows("index_copy", indexing(Indexed(values="source"))),
    **rows("index_fill.int_Scalar index_fill.int_Tensor", indexing(Indexed(values="value"))),
    **rows("index_put", indexing(Indexed(indices="indices", dim=None, values="values"))),
    **rows("one_hot take masked_scatter grid_sampler embedding_bag.padding_idx", OpInfo(Kind.INDEXING, Opaque())),
    **rows("bucketize.Tensor", OpInfo(Kind.INDEXING, Broadcast(("self",)))),
    **rows("isin.Tensor_Scalar", OpInfo(Kind.INDEXING, Broadcast(("elements",)))),
    **rows("isin.Tensor_Tensor", OpInfo(Kind.INDEXING, Broadcast(("elements",)))),
}
