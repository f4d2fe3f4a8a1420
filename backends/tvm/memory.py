"""Weights in one piece of memory, of pages as large as the system has.

Kernels stream through their weights, and every page of 4 KB that they come to has to be looked up anew: up to a tenth
of the time of a function. The weights of a bundle are mapped from one file and have no need of it.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import torch
from torch.utils import dlpack
from tvm import runtime

__all__ = ["move_together"]

_ALIGNMENT = 64
_LARGE_PAGE = 2 << 20
_MOST = 1 << 30
"""Bytes that are moved: the old and the new may be in memory at once for a while."""


def move_together(weights: list[Any]) -> None:
    """Replace TVM tensors on the CPU by copies that lie one after the other. Tensors of one memory stay so."""
    tensors = [dlpack.from_dlpack(weight) for weight in weights]
    sizes = {_key(tensor): -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors}
    if not 0 < sum(sizes.values()) <= _MOST:
        return
    memory, end = _large_pages(sum(sizes.values())), 0
    copies: dict[tuple[int, int], torch.Tensor] = {}
    tensors.reverse()
    for number in range(len(weights)):
        tensor = tensors.pop()
        key = _key(tensor)
        if key not in copies:
            place = memory[end : end + tensor.nbytes]
            np.copyto(place, tensor.reshape(-1).view(torch.uint8).numpy())  # torch would wake its threads
            copies[key] = torch.from_numpy(place)
            end += sizes[key]
        weights[number] = runtime.from_dlpack(copies[key].view(tensor.dtype).reshape(tensor.shape))


def _key(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def _large_pages(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Zeros that begin at a large page, where the system has such."""
    room = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # another system, or one that was told to have none
        room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, np.uint8)
    start = -memory.ctypes.data % _LARGE_PAGE
    return memory[start : start + size]
