"""Constants over the memory of a model's own tensors, which is copied only where it stays.

Most weights are packed for the kernels while a model is imported. A copy of each beforehand would be a third time the
model in memory, beside the model and what was packed. So importing reads the model's tensors where they are, and at its
end what is still theirs is copied: training the model later must not change what was compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import dlpack
from tvm import IRModule, relax, runtime

from graphopt.backends.tvm.registry import dtype_name

__all__ = ["Borrowed"]

_ALIGNMENT = 64
"""What TVM expects of the address of a tensor, in bytes."""


class Borrowed:
    """The constants of one import; tied tensors share one."""

    def __init__(self) -> None:
        self._constants: dict[Any, Any] = {}
        self._lent: list[tuple[int, int]] = []

    def constant(self, tensor: torch.Tensor) -> Any:
        """A constant that holds the tensor, over its memory where that is dense, aligned and here."""
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else None
        if key is None or key not in self._constants:
            fits = tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.is_neg()
            if fits and tensor.numel() and tensor.data_ptr() % _ALIGNMENT == 0:
                start = tensor.data_ptr()
                self._lent.append((start, start + tensor.nbytes))
                value = runtime.from_dlpack(tensor.detach())
            else:
                value = _copy(tensor)
            self._constants[key] = relax.const(value, dtype_name(tensor.dtype))
        return self._constants[key]

    def returned(self, module: IRModule) -> IRModule:
        """The module with copies of the constants that lie in memory of the model."""
        self._constants.clear()
        copier = _Copier(self._lent)
        main = copier.visit_expr(module["main"])
        return IRModule({**module.functions, module.get_global_var("main"): main}, module.attrs)


@relax.expr_functor.mutator
class _Copier(relax.PyExprMutator):
    def __init__(self, lent: list[tuple[int, int]]) -> None:
        super().__init__()
        self._lent = lent
        self._copies: dict[Any, Any] = {}

    def visit_generic_const_(self, constant: Any) -> Any:
        tensor = dlpack.from_dlpack(constant.value)
        at = tensor.data_ptr()
        if not any(start <= at < end for start, end in self._lent):
            return constant
        key = (at, tensor.dtype, tensor.shape)
        if key not in self._copies:
            self._copies[key] = relax.const(_copy(tensor), dtype_name(tensor.dtype))
        return self._copies[key]


def _copy(tensor: torch.Tensor) -> Any:
    return runtime.from_dlpack(tensor.detach().to("cpu", copy=True).contiguous())
