"""Kernels that take and give tensors of any dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tvm import IRModule, tirx, transform
from tvm import compile as tvm_compile

from graphopt.backends.tvm.backend import tvm_target
from graphopt.backends.tvm.pipeline import CPU_CODE
from graphopt.backends.tvm.runtime import ffi, use_threads
from graphopt.target import this_machine

__all__ = ["TypedLibrary", "compiled_typed"]

TypedLibrary = Callable[[Sequence[Tensor], Sequence[int], torch.dtype], Tensor]

_GUARD = 64
"""Elements before and after each tensor: a multiple of any alignment, whatever the dtype."""


def compiled_typed(functions: Mapping[str, Any]) -> dict[str, TypedLibrary]:
    """Machine code of several functions in one library; each takes operands, and shape and dtype of the result."""
    assert all(function is not None for function in functions.values()), "refused"
    named = {name: f.without_attr("global_symbol").with_attr("global_symbol", name) for name, f in functions.items()}
    module = tirx.transform.ConvertSSA()(IRModule(named))
    use_threads(1)
    with transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        library = tvm_compile(module, target=tvm_target(this_machine()), tir_pipeline=CPU_CODE).jit()
    return {name: _typed(library[name]) for name in functions}


def _typed(function: Any) -> TypedLibrary:
    def run(operands: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        whole, result = _guarded(torch.full(tuple(shape), _odd(dtype), dtype=dtype), _ordinary(dtype))
        function(
            *(ffi().from_dlpack(tensor) for tensor in (*(_guarded(x, _odd(x.dtype))[1] for x in operands), result))
        )
        for guard in (whole[:_GUARD], whole[-_GUARD:]):
            assert bool((guard == torch.tensor(_ordinary(dtype), dtype=dtype)).all()), "written outside of the result"
        return result

    return run


def _odd(dtype: torch.dtype) -> Any:
    """What fills a result before it is written, and the memory around operands."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else 113


def _ordinary(dtype: torch.dtype) -> Any:
    """What is around a result: not what is around operands, which a kernel that reads too far would write there."""
    return False if dtype == torch.bool else 57


def _guarded(tensor: Tensor, around: Any) -> tuple[Tensor, Tensor]:
    whole = torch.full((_GUARD + tensor.numel() + _GUARD,), around, dtype=tensor.dtype)
    inner = whole[_GUARD:].as_strided(tensor.shape, _compact(tensor.shape))
    inner.copy_(tensor)
    return whole, inner


def _compact(shape: Sequence[int]) -> list[int]:
    """Strides as compiled code expects them; torch counts an axis without elements as one of one element."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
