"""Reductions, running sums, sorting, and losses."""

from __future__ import annotations

from graphopt.ops.axes import Along, Opaque, Reduced
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]

BY_AXES = """
    sum.dim_IntList mean.dim nansum nanmean amax amin var.dim var.correction std.dim std.correction
    var_mean.dim var_mean.correction std_mean.dim std_mean.correction logsumexp special_logsumexp prod.dim_int
    max.dim min.dim argmax argmin any.dim all.dim norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype
    linalg_vector_norm aminmax median.dim nanmedian.dim mode kthvalue
"""
OF_ALL = """
    var sum mean prod max min any all std var_mean std_mean median nanmedian norm.Scalar norm.ScalarOpt_dtype
"""
SCANS = "cumsum cumprod cummax cummin logcumsumexp"
LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy_loss nll_loss nll_loss2d nll_loss_nd kl_div
    binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss hinge_embedding_loss
    poisson_nll_loss margin_ranking_loss cosine_embedding_loss triplet_margin_loss
"""


def reduction(axes: Reduced) -> OpInfo:
    return OpInfo(Kind.REDUCTION, axes, work=1)


ROWS: dict[str, OpInfo] = {
    **rows(BY_AXES, reduction(Reduced())),
    **rows(OF_ALL, reduction(Reduced(dim=None, keepdim=None))),
    **rows("any.dims all.dims", reduction(Reduced(empty_is_all=False))),
    **rows("count_nonzero count_nonzero.dim_IntList", reduction(Reduced(keepdim=None))),
    # Pairs positions i and i + n/2 of an axis of n.
    **rows("glu", OpInfo(Kind.REDUCTION, Along(), work=2)),
    # Joins `prepend` and `append` to the input along the axis before it subtracts.
    **rows("diff", OpInfo(Kind.REDUCTION, Opaque(), work=1)),
    **rows("cosine_similarity", OpInfo(Kind.REDUCTION, Opaque(), work=6)),
    **rows(SCANS, OpInfo(Kind.SCAN, Along(), work=1)),
    **rows("sort sort.stable argsort argsort.stable topk", OpInfo(Kind.SORTING, Along())),
    **rows("msort", OpInfo(Kind.SORTING, Along(axis=0))),
    **rows(LOSSES, OpInfo(Kind.LOSS, Opaque(), work=3)),
}
