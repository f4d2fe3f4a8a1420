"""Running GPU code: TVM's runtime and CUDA's, no compiler; torch only where tensors are torch's."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import numpy as np

from graphopt.backends.tvm.cuda.nvcc import name_of
from graphopt.backends.tvm.runtime import ffi, library
from graphopt.errors import GraphoptError, InputError, UnsupportedError

__all__ = ["GpuMachine", "gpu_runtime", "hand_over", "require_gpu", "why_no_gpu"]

_CPU, _CUDA, _POOLED = 1, 2, 2
_ALIGNMENT = 16
_CALLBACK = "tvm_callback_cuda_compile"

_compiled: dict[str, bytes] = {}
"""Machine code by the name of its source."""


def hand_over(source: str, code: bytes) -> None:
    """Have the runtime use this machine code wherever a library asks to have this source compiled."""
    if not _compiled:
        ffi().register_global_func(_CALLBACK, _looked_up, override=True)
    _compiled[name_of(source)] = code


def _looked_up(source: str) -> bytes:
    name = name_of(source)
    if name not in _compiled:
        raise GraphoptError(
            "GPU code was asked for that nothing has compiled",
            why=f"no machine code for the source {name[:12]} was loaded",
            todo="load the whole artifact with `load_artifact`, not its library alone",
        )
    return _compiled[name]


@cache
def why_no_gpu(arch: str) -> str | None:
    """Why code for an architecture does not run on this machine; None when it does."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"there is no NVIDIA driver: {error}"
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"the NVIDIA driver finds no GPU (error {status})"
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, 0)
    here = f"sm_{major.value}{minor.value}"
    wanted = int(arch.removeprefix("sm_").rstrip("af"))
    # Machine code runs on later GPUs of the same major version.
    if wanted // 10 == major.value and wanted % 10 <= minor.value:
        return None
    return f"the GPU of this machine is {here}"


_MAJOR, _MINOR = 75, 76
"""The driver's numbers for the two parts of the compute capability."""


def require_gpu(arch: str) -> None:
    """Refuse to go on without a GPU that runs code for `arch`.

    Raises:
        UnsupportedError: naming what is missing.
    """
    why = why_no_gpu(arch)
    if why is not None:
        raise UnsupportedError(
            f"this artifact is code for an NVIDIA GPU, {arch}, which this machine cannot run",
            why=why,
            todo="save it (`artifact.save(DIR)`) and run it on such a machine, or build for a CPU: --target cpu",
        )


@cache
def gpu_runtime() -> Any:
    """`tvm_ffi` with the CUDA part of TVM's runtime."""
    package = ffi()
    if package.get_global_func("device_api.cuda", allow_missing=True) is None:
        ctypes.CDLL(str(library("libtvm_runtime_cuda.so")), mode=ctypes.RTLD_GLOBAL)
    return package


class GpuMachine:
    """The virtual machine of one loaded module on the first GPU; `main` takes the inputs and then the weights.

    Args:
        module: the host's part of the code, which holds the source of the GPU's.
        weights: (dtype, shape, bytes) each, copied to the GPU now.
    """

    def __init__(self, module: Any, weights: list[tuple[str, tuple[int, ...], Any]]) -> None:
        self._ffi = gpu_runtime()
        self._machine = module["vm_load_executable"]()
        self._machine["vm_initialization"](_CUDA, 0, _POOLED, _CPU, 0, _POOLED)
        self._main = self._machine["main"]
        self._device = self._ffi.device("cuda", 0)
        self._weights = [self._uploaded(*weight) for weight in weights]
        self._one_at_a_time = threading.Lock()

    def _uploaded(self, dtype: str, shape: tuple[int, ...], data: Any) -> Any:
        tensor = self.empty(dtype, shape)
        array = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return tensor

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """A new tensor in the GPU's memory."""
        allocate = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        return allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self._device, None)

    def run(self, tensors: list[Any]) -> list[Any]:
        """Run on torch tensors (on the GPU, or copied there) or numpy arrays; returns TVM tensors on the GPU."""
        inputs = [self._input(tensor) for tensor in tensors]
        with self._one_at_a_time:
            return list(self._main(*inputs, *self._weights))

    def _input(self, tensor: Any) -> Any:
        if isinstance(tensor, np.ndarray):
            return self._uploaded(str(tensor.dtype), tensor.shape, tensor)
        tensor = tensor.detach().cuda().resolve_neg().contiguous()
        if tensor.data_ptr() % _ALIGNMENT:
            tensor = tensor.clone()
        return self._ffi.from_dlpack(tensor)

    def fetched(self, tensor: Any) -> np.ndarray[Any, Any]:
        """A copy of a TVM tensor in this process's memory."""
        dtype = str(tensor.dtype)
        if dtype == "bfloat16":
            raise InputError("an output is bfloat16, which numpy does not know", todo="pass torch tensors")
        array: np.ndarray[Any, Any] = np.empty(tuple(int(n) for n in tensor.shape), dtype)
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array
