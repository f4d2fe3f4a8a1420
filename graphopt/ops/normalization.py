"""Normalisations, and softmax, which normalises along one axis."""

from __future__ import annotations

from graphopt.ops import literals
from graphopt.ops.axes import Along, Normalized
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]

AFFINE = ("weight", "bias")
TRACKED = ("weight", "bias", "running_mean", "running_var")

BATCH = OpInfo(Kind.NORMALIZATION, Normalized("batch", TRACKED, "training"), work=2, training="training", stateful=True)
INSTANCE = OpInfo(
    Kind.NORMALIZATION,
    Normalized("instance", TRACKED, "use_input_stats"),
    work=6,
    training="use_input_stats",
    stateful=True,
)
GROUP = OpInfo(
    Kind.NORMALIZATION,
    Normalized("group", AFFINE),
    work=6,
    literals=literals.channel_groups("num_groups", "input", 1),
)
LAYER = OpInfo(Kind.NORMALIZATION, Normalized("trailing", AFFINE), work=6, literals=literals.trailing_sizes)
RMS = OpInfo(Kind.NORMALIZATION, Normalized("trailing", ("weight",)), work=4, literals=literals.trailing_sizes)
SOFTMAX = OpInfo(Kind.SOFTMAX, Along(), work=5)

ROWS: dict[str, OpInfo] = {
    **rows("batch_norm", BATCH),
    **rows("instance_norm", INSTANCE),
    **rows("group_norm", GROUP),
    **rows("layer_norm", LAYER),
    **rows("rms_norm", RMS),
    **rows("softmax.int log_softmax.int special_softmax special_log_softmax _softmax _log_softmax", SOFTMAX),
}
