"""Pooling and resampling: windows over the trailing axes, every leading position by itself."""

from __future__ import annotations

from graphopt.ops.axes import Windowed
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]


def pooling(trailing: int) -> OpInfo:
    return OpInfo(Kind.POOLING, Windowed(trailing), work=1)


def resampling(names: str, trailing: int, work: int) -> dict[str, OpInfo]:
    """Each operator, and its `vec` overload, which calls the tensor `input` and takes scale factors."""
    return {
        **rows(names, OpInfo(Kind.RESAMPLING, Windowed(trailing), work=work)),
        **rows(
            " ".join(f"{name}.vec" for name in names.split()),
            OpInfo(Kind.RESAMPLING, Windowed(trailing, "input"), work=work),
        ),
    }


ROWS: dict[str, OpInfo] = {
    **rows("avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d", pooling(1)),
    **rows("avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d", pooling(2)),
    **rows("avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d adaptive_max_pool3d", pooling(3)),
    **resampling("upsample_nearest1d _upsample_nearest_exact1d", 1, 0),
    **resampling("upsample_nearest2d _upsample_nearest_exact2d", 2, 0),
    **resampling("upsample_nearest3d _upsample_nearest_exact3d", 3, 0),
    **resampling("upsample_linear1d", 1, 3),
    **resampling("upsample_bilinear2d _upsample_bilinear2d_aa", 2, 7),
    **resampling("upsample_trilinear3d", 3, 15),
    **resampling("upsample_bicubic2d _upsample_bicubic2d_aa", 2, 31),
}
