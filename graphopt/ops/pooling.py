"""Pooling and resampling: windows over the trailing axes, every leading position by itself."""

from __future__ import annotations

from graphopt.ops.axes import Windowed
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]


def pooling(trailing: int) -> OpInfo:
    return OpInfo(Kind.POOLING, Windowed(trailing), work=1)


def resampling(trailing: int, work: int) -> OpInfo:
    return OpInfo(Kind.RESAMPLING, Windowed(trailing), work=work)


ROWS: dict[str, OpInfo] = {
    **rows(
        "avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d", pooling(1)
    ),
    **rows(
        "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d", pooling(2)
    ),
    **rows(
        "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d adaptive_max_pool3d", pooling(3)
    ),
    **rows("upsample_nearest1d upsample_nearest1d.vec", resampling(1, 0)),
    **rows("_upsample_nearest_exact1d _upsample_nearest_exact1d.vec", resampling(1, 0)),
    **rows("upsample_nearest2d upsample_nearest2d.vec", resampling(2, 0)),
    **rows("_upsample_nearest_exact2d _upsample_nearest_exact2d.vec", resampling(2, 0)),
    **rows("upsample_nearest3d upsample_nearest3d.vec", resampling(3, 0)),
    **rows("_upsample_nearest_exact3d _upsample_nearest_exact3d.vec", resampling(3, 0)),
    **rows("upsample_linear1d upsample_linear1d.vec", resampling(1, 3)),
    **rows("upsample_bilinear2d upsample_bilinear2d.vec", resampling(2, 7)),
    **rows("_upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec", resampling(2, 7)),
    **rows("upsample_trilinear3d upsample_trilinear3d.vec", resampling(3, 15)),
    **rows("upsample_bicubic2d upsample_bicubic2d.vec", resampling(2, 31)),
    **rows("_upsample_bicubic2d_aa _upsample_bicubic2d_aa.vec", resampling(2, 31)),
}
