"""ONNX element types and tensors as torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from graphopt.frontends.onnx.values import refuse

__all__ = ["DTYPES", "INTEGERS", "SAME_BITS", "from_numpy", "to_dtype", "to_tensor"]

DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64,
    14: torch.complex64, 15: torch.complex128, 16: torch.bfloat16, 17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz, 19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz,
}  # fmt: skip
"""`TensorProto.DataType` to dtype. Left out: string (8), and the types of less than a byte (21 to 26)."""

_NAMES = {8: "string", 21: "uint4", 22: "int4", 23: "float4e2m1", 24: "float8e8m0", 25: "uint2", 26: "int2"}

INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64}
)

SAME_BITS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per element to the integer dtype used to look at bits."""


def to_dtype(code: int) -> torch.dtype:
    """The dtype of a `TensorProto.DataType`.

    Raises:
        Refusal: for strings and types of less than a byte.
    """
    if code not in DTYPES:
        raise refuse(f"element type {_NAMES.get(code, code)} has no torch dtype", "convert the model to a wider type")
    return DTYPES[code]


def to_tensor(proto: Any, base_dir: str = "") -> torch.Tensor:
    """A `TensorProto` as a tensor of the same dtype and shape; external data is read from `base_dir`.

    Raises:
        Refusal: for an element type without a dtype.
    """
    from onnx import numpy_helper

    dtype = to_dtype(proto.data_type)
    return from_numpy(numpy_helper.to_array(proto, base_dir).reshape(tuple(proto.dims)), dtype)


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A numpy array as a tensor; bfloat16 and float8 arrays, which numpy has by extension, are reinterpreted."""
    shape, array = array.shape, np.ascontiguousarray(array)
    if array.dtype.kind in "biufc" and array.dtype.type.__module__ == "numpy":
        return torch.from_numpy(array.reshape(shape).copy())
    if dtype is None:
        dtype = getattr(torch, array.dtype.name)
    bits = array.view(np.uint8 if array.dtype.itemsize == 1 else np.int16)  # bfloat16 and the float8 types
    return torch.from_numpy(bits.reshape(shape).copy()).view(dtype)
