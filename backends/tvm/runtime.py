"""TVM's runtime alone: no compiler, no torch.

`tvm_ffi` imports torch whenever it finds it, and `import tvm` loads the compiler (260 MB). A process that only runs a
saved artifact needs neither: here torch is hidden while `tvm_ffi` is imported, and the two runtime libraries of the TVM
package are loaded by their file names.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import GraphoptError, InputError, LoadError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHECK_WEIGHTS",
    "START_THREADS",
    "STOP_THREADS",
    "Machine",
    "aligned",
    "ffi",
    "ffi_library",
    "library",
    "to_numpy",
    "use_threads",
]

START_THREADS, STOP_THREADS = "graphopt_start_threads", "graphopt_stop_threads"
"""Functions of every compiled library, for the threads that run its loops."""

CHECK_WEIGHTS = "check_weights"
"""A function of every compiled library: it raises where the weights are not those that its code is for."""

_ALIGNMENT = 64
_BOUND = "main_with_weights"
_LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
_CPU, _POOLED = 1, 2


@cache
def ffi() -> Any:
    """The `tvm_ffi` package with TVM's runtime loaded.

    Raises:
        GraphoptError: when the TVM package, or a library of it, is missing.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        import tvm_ffi
    finally:
        if hidden:
            del sys.modules["torch"]
    if "tvm" not in sys.modules:
        for name in _LIBRARIES:
            ctypes.CDLL(str(library(name)), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


def library(name: str) -> Path:
    """The path of a library of the TVM package.

    Raises:
        GraphoptError: when it is not installed.
    """
    return _library("tvm", name, "apache-tvm")


def ffi_library() -> Path:
    """The path of the library of the package apache-tvm-ffi.

    Raises:
        GraphoptError: when it is not installed.
    """
    return _library("tvm_ffi", "libtvm_ffi.so", "apache-tvm-ffi")


def _library(module: str, name: str, package: str) -> Path:
    spec = PathFinder.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
    raise GraphoptError(f"TVM's runtime library {name} is not installed", todo=f"install the package {package}")


class Machine:
    """The virtual machine of one loaded module, and its threads; `main` takes the inputs and then the weights, which
    are bound to it once: a hundred arguments for each call would be a tenth of a millisecond."""

    def __init__(self, module: Any, weights: list[Any], threads: int) -> None:
        self._ffi = ffi()
        with _starting:
            module.get_function(START_THREADS, query_imports=True)(threads)
        stop = module.get_function(STOP_THREADS, query_imports=True)
        weakref.finalize(self, _stop_threads, stop, os.getpid())
        self._machine = module["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, 0, _POOLED)
        _require_fitting(self._machine[CHECK_WEIGHTS], weights)
        self._machine["save_function"]("main", _BOUND, True, *weights)
        self._main = self._machine[_BOUND]
        self._one_at_a_time = threading.Lock()

    def run(self, tensors: list[Any]) -> list[Any]:
        """Run on numpy arrays or torch tensors; returns torch's tensors for these, and TVM's for arrays. Calls of
        several threads wait for one another."""
        inputs = [tensor if _fits(tensor) else self._input(tensor) for tensor in tensors]
        with self._one_at_a_time:  # the virtual machine keeps the state of its call
            results = self._main(*inputs)
        return [results[i] for i in range(len(results))]

    def watch(self, watch: Callable[..., int] | None) -> None:
        """Call a function before and after every function of the module, or no more."""
        self._machine["set_instrument"](watch)

    def _input(self, tensor: Any) -> Any:
        """What compiled code takes of a tensor that is not as it expects: the same memory, or a copy of it."""
        if isinstance(tensor, np.ndarray):
            return self._ffi.from_dlpack(aligned(tensor))
        if tensor.device.type != "cpu":
            raise InputError(f"an input is on {tensor.device}, the artifact runs on the CPU", todo="pass tensor.cpu()")
        tensor = tensor.detach()
        return tensor if _fits(tensor) else _copied(tensor)


def _require_fitting(check: Any, weights: list[Any]) -> None:
    try:
        check(*weights)
    except Exception as error:  # of whatever kind TVM's check makes it
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise LoadError("the weights are not those that the code is for", why=why) from error


def _fits(tensor: Any) -> bool:
    """Whether it is a torch tensor whose memory is here, dense and aligned: `tvm_ffi` takes it, and gives such back."""
    return (
        not isinstance(tensor, np.ndarray)
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.data_ptr() % _ALIGNMENT == 0
        and not tensor.is_neg()
        and not tensor.requires_grad
    )


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A dense and aligned copy, which numpy makes: torch would wake its threads for it, and these would spin for
    milliseconds on the cores that the compiled code is about to use (twice the time of a small net)."""
    import torch

    # numpy does not know every type (bfloat16 for one), but integers of every size
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.from_numpy(aligned(tensor.resolve_neg().view(integers).numpy())).view(tensor.dtype)


def _stop_threads(stop: Any, process: int) -> None:
    if os.getpid() == process:  # a forked process has no threads but the one that forked
        with _starting:
            stop()


_starting = threading.RLock()
"""Held while threads are started or stopped; again by the same thread when it collects garbage meanwhile."""

_pool = threading.local()
_ALL_THREADS_SHARE_ALL_CORES = -3


def use_threads(count: int) -> None:
    """Set the number of threads of TVM's own pool, which runs what is not in an artifact: code to fold constants.

    TVM keeps one pool per calling thread, made at its first use with half of the processors, and binds threads (the
    caller's too) to cores. Here the pool is made with all processors that the process may use, and nothing is bound.
    """
    if getattr(_pool, "count", 0) == count:
        return
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    cores += [cores[i % len(cores)] for i in range(count - len(cores))]
    os.environ["TVM_NUM_THREADS"] = str(len(cores))  # or OMP_NUM_THREADS, meant for others, would limit the pool
    ffi().get_global_func("runtime.config_threadpool")(_ALL_THREADS_SHARE_ALL_CORES, count, cores)
    _pool.count = count


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array, or a copy of it, where it is dense, writable and aligned as compiled code expects."""
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % _ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy: np.ndarray[Any, Any] = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A TVM tensor as a numpy array over the same memory."""
    array: np.ndarray[Any, Any] = np.from_dlpack(tensor)
    return array
