"""Sample calls of operators that move, read or map elements, where the schema alone does not give one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]


def t(*shape: int) -> Tensor:
    """Distinct, unordered values between 0.1 and 0.9."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    return ((torch.randperm(count, generator=generator) + 1) / (count + 1) * 0.8 + 0.1).reshape(shape)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


X = (2, 4, 6)
IMAGE = (2, 4, 6, 8)
VOLUME = (2, 4, 4, 6, 4)

MOVEMENTS: dict[str, list[Call]] = {
    "view_as": [call(t(*X), t(8, 6))],
    "reshape_as": [call(t(*X), t(8, 6))],
    "expand_as": [call(t(4, 1), t(2, 4, 6))],
    "permute": [call(t(*X), [2, 0, 1])],
    "permute_copy": [call(t(*X), [2, 0, 1])],
    "transpose.int": [call(t(*X), 0, -1)],
    "transpose_copy.int": [call(t(*X), 0, -1)],
    "t": [call(t(3, 4)), call(t(3))],
    "t_copy": [call(t(3, 4))],
    "numpy_T": [call(t(3, 4))],
    "mT": [call(t(*X))],
    "flatten.using_ints": [call(t(*X), 1), call(t(*X), 0, 1)],
    "squeeze": [call(t(1, 4, 1))],
    "squeeze.dim": [call(t(1, 4, 1), 0), call(t(1, 4, 1), 1)],
    "squeeze.dims": [call(t(1, 4, 1), [0, 2])],
    "squeeze_copy": [call(t(1, 4, 1))],
    "squeeze_copy.dim": [call(t(1, 4, 1), 0)],
    "squeeze_copy.dims": [call(t(1, 4, 1), [0, 2])],
    "unsqueeze": [call(t(*X), 1)],
    "unsqueeze_copy": [call(t(*X), 1)],
    "select.int": [call(t(*X), 1, 2), call(t(*X), -1, -1)],
    "select_copy.int": [call(t(*X), 1, 2)],
    "slice.Tensor": [call(t(*X), 1, 1, 3), call(t(*X), 2, None, None, 2), call(t(*X), 2, -3)],
    "slice_copy.Tensor": [call(t(*X), 1, 1, 3)],
    "narrow": [call(t(*X), 1, 1, 2)],
    "narrow_copy": [call(t(*X), 1, 1, 2)],
    "split.Tensor": [call(t(*X), 4, 2)],
    "split_copy.Tensor": [call(t(*X), 4, 2)],
    "unsafe_split.Tensor": [call(t(*X), 4, 2)],
    "split.sizes": [call(t(*X), [1, 5], 2)],
    "split_with_sizes": [call(t(*X), [1, 5], 2)],
    "split_with_sizes_copy": [call(t(*X), [1, 5], 2)],
    "unsafe_split_with_sizes": [call(t(*X), [1, 5], -1)],
    "chunk": [call(t(*X), 4, -1)],
    "unsafe_chunk": [call(t(*X), 4, -1)],
    "unbind.int": [call(t(*X), 1)],
    "unbind_copy.int": [call(t(*X), 1)],
    "tensor_split.sections": [call(t(*X), 4, 2)],
    "tensor_split.indices": [call(t(*X), [1, 3], 2)],
    "hsplit.int": [call(t(*X), 2)],
    "hsplit.array": [call(t(*X), [1, 2])],
    "vsplit.int": [call(t(*X), 2)],
    "vsplit.array": [call(t(*X), [1])],
    "dsplit.int": [call(t(*X), 2)],
    "dsplit.array": [call(t(*X), [1])],
    "movedim.int": [call(t(*X), 0, 2)],
    "movedim.intlist": [call(t(*X), [0, 1], [2, 0])],
    "moveaxis.int": [call(t(*X), 0, 2)],
    "moveaxis.intlist": [call(t(*X), [0, 1], [2, 0])],
    "swapaxes": [call(t(*X), 0, 1)],
    "swapdims": [call(t(*X), 0, 1)],
    "diagonal": [call(t(*X), 1, 1, 2)],
    "diagonal_copy": [call(t(*X), 0, 1, 2)],
    "unfold": [call(t(*X), 2, 3, 2)],
    "unfold_copy": [call(t(*X), 2, 3, 2)],
    "flip": [call(t(*X), [0, 2])],
    "fliplr": [call(t(*X))],
    "flipud": [call(t(*X))],
    "roll": [call(t(*X), [3], [2]), call(t(*X), [2])],
    "rot90": [call(t(*X), 1, [1, 2])],
    "repeat": [call(t(*X), [2, 1, 2, 1])],
    "tile": [call(t(*X), [2, 2])],
    "repeat_interleave.self_int": [call(t(*X), 2, 1), call(t(*X), 3)],
    "im2col": [call(t(*IMAGE), [3, 2], [1, 1], [1, 0], [2, 1])],
    "constant_pad_nd": [call(t(*X), [1, 2, -1, 0]), call(t(*X), [1, 2], 7.0)],
    "pad": [
        call(t(*X), [1, 2]),
        call(t(*IMAGE), [1, 2, 1, 0], "reflect"),
        call(t(*IMAGE), [1, 2, 1, 0], "replicate"),
        call(t(*IMAGE), [1, 2, 1, 0], "circular"),
    ],
    "reflection_pad1d": [call(t(*X), [1, 2])],
    "reflection_pad2d": [call(t(*IMAGE), [1, 2, 1, 0])],
    "reflection_pad3d": [call(t(*VOLUME), [1, 2, 1, 0, 1, 1])],
    "replication_pad1d": [call(t(*X), [1, 2])],
    "replication_pad2d": [call(t(*IMAGE), [1, 2, 1, 0])],
    "replication_pad3d": [call(t(*VOLUME), [1, 2, 1, 0, 1, 1])],
    "tril": [call(t(*X), 1)],
    "triu": [call(t(*X))],
    "diag": [call(t(4)), call(t(4, 4), 1)],
    "diag_embed": [call(t(2, 3), 1)],
    "diagflat": [call(t(2, 3))],
    "cat": [call([t(2, 3), t(2, 5)], 1)],
    "concat": [call([t(2, 3), t(2, 5)], 1)],
    "concatenate": [call([t(2, 3), t(2, 5)], -1)],
    "stack": [call([t(2, 3), t(2, 3)], 1)],
    "hstack": [call([t(2, 3), t(2, 5)])],
    "vstack": [call([t(2, 3), t(4, 3)])],
    "dstack": [call([t(2, 3), t(2, 3)])],
    "column_stack": [call([t(2, 3), t(2, 4)])],
    "row_stack": [call([t(2, 3), t(4, 3)])],
    "block_diag": [call([t(2, 3), t(4, 3)])],
    "meshgrid": [call([t(2), t(3)])],
    "meshgrid.indexing": [call([t(2), t(3)], indexing="xy")],
    "broadcast_tensors": [call([t(2, 1), t(3)])],
    "select_scatter": [call(t(*X), t(2, 6) + 1, 1, 2)],
    "slice_scatter": [call(t(*X), t(2, 2, 6) + 1, 1, 1, 3)],
    "diagonal_scatter": [call(t(4, 4), t(4) + 1)],
    "view": [call(t(*X), [8, 6]), call(t(*X), [2, -1])],
    "_unsafe_view": [call(t(*X), [8, 6])],
    "view_copy": [call(t(*X), [8, 6])],
    "reshape": [call(t(*X), [8, 6]), call(t(*X).mT, [2, 24])],
    "expand": [call(t(4, 1), [2, -1, 6])],
    "expand_copy": [call(t(4, 1), [2, 4, 6])],
    "broadcast_to": [call(t(4, 1), [2, 4, 6])],
    "unflatten.int": [call(t(*X), 2, [2, -1])],
    "pixel_shuffle": [call(t(2, 8, 3, 3), 2)],
    "pixel_unshuffle": [call(t(2, 2, 4, 6), 2)],
    "channel_shuffle": [call(t(2, 6, 3, 3), 3)],
    "native_channel_shuffle": [call(t(2, 6, 3, 3), 3)],
}

POINTWISE: dict[str, list[Call]] = {
    "where.self": [call(t(2, 1, 4) > 0.5, t(3, 1), t(2, 3, 4))],
    "where.ScalarSelf": [call(t(2, 1, 4) > 0.5, 2.0, t(3, 1))],
    "where.ScalarOther": [call(t(2, 1, 4) > 0.5, t(3, 1), 2.0)],
    "where.Scalar": [call(t(2, 1, 4) > 0.5, 1.0, 2.0)],
    "masked_fill.Scalar": [call(t(2, 1, 4), t(3, 1) > 0.5, 2.0)],
    "masked_fill.Tensor": [call(t(2, 1, 4), t(3, 1) > 0.5, torch.tensor(2.0))],
    "fill.Tensor": [call(t(2, 3), torch.tensor(2.0))],
    "to.dtype": [call(t(2, 3), torch.float64)],
    "to.dtype_layout": [call(t(2, 3), dtype=torch.float64)],
    "to.device": [call(t(2, 3), torch.device("cpu"), torch.float64)],
    "to.other": [call(t(2, 3), ints(1))],
    "type_as": [call(t(2, 3), ints(1, 2))],
    "prelu": [call(t(2, 3, 4) - 0.5, t(3))],
    "fake_quantize_per_tensor_affine": [call(t(2, 3), 0.1, 0, -128, 127)],
    "fake_quantize_per_tensor_affine.tensor_qparams": [
        call(t(2, 3), torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32), -128, 127)
    ],
    "threshold": [call(t(2, 3), 0.5, 7.0)],
    "dropout": [call(t(2, 3), 0.5, False)],
    "feature_dropout": [call(t(2, 3), 0.5, False)],
    "alpha_dropout": [call(t(2, 3), 0.5, False)],
    "feature_alpha_dropout": [call(t(2, 3), 0.5, False)],
    "rrelu": [call(t(2, 3) - 0.5, 0.1, 0.3, False)],
    "bucketize.Tensor": [call(t(2, 3), torch.tensor([0.2, 0.5]))],
    "isin.Tensor_Scalar": [call((t(2, 3) * 4).long(), 2)],
    "isin.Tensor_Tensor": [call((t(2, 3) * 4).long(), ints(1, 2))],
}
POINTWISE = {name if "." in name else f"{name}.default": calls for name, calls in POINTWISE.items()}

ROWS_OF_SIX = ints(0, 2, 1).reshape(1, 3, 1).expand(2, 3, 6)
INDEXING: dict[str, list[Call]] = {
    "embedding": [call(t(5, 3), ints(4, 0, 0))],
    "index_select": [call(t(*X), 1, ints(3, 0, 0))],
    "gather": [call(t(*X), 1, ROWS_OF_SIX)],
    "take_along_dim": [call(t(*X), ROWS_OF_SIX, 1)],
    "index.Tensor": [call(t(*X), [None, ints(3, 0)]), call(t(*X), [ints(1, 0), None, ints(2, 5)])],
    "scatter.src": [call(t(*X), 1, ROWS_OF_SIX, t(2, 3, 6) + 1)],
    "scatter.value": [call(t(*X), 1, ROWS_OF_SIX, 7.0)],
    "scatter_add": [call(t(*X), 1, ROWS_OF_SIX, t(2, 3, 6))],
    "scatter_reduce.two": [call(t(*X), 1, ROWS_OF_SIX, t(2, 3, 6), "sum")],
    "index_add": [call(t(*X), 1, ints(3, 0), t(2, 2, 6))],
    "index_copy": [call(t(*X), 1, ints(3, 0), t(2, 2, 6) + 1)],
    "index_fill.int_Scalar": [call(t(*X), 1, ints(3, 0), 7.0)],
    "index_fill.int_Tensor": [call(t(*X), 1, ints(3, 0), torch.tensor(1.5))],
    "index_put": [call(t(*X), [None, ints(3, 0)], t(2, 2, 6) + 1)],
}
