"""How a Target becomes one of TVM's, for a GPU."""

from __future__ import annotations

import re
from typing import Any

from graphopt.errors import UnsupportedError
from graphopt.target import Target

__all__ = ["gpu_target"]

_OLDEST = 80
"""Compute capability 8.0: asynchronous copies, and tensor cores that take bfloat16."""


def gpu_target(target: Target) -> Any:
    """The TVM target of a GPU beside an x86-64 host.

    Raises:
        UnsupportedError: for an architecture that is too old for these kernels, or no name of one.
    """
    number = re.fullmatch(r"sm_(\d+)[af]?", target.arch)
    if number is None or int(number[1]) < _OLDEST:
        raise UnsupportedError(
            f"the backend 'tvm' does not compile for {target.kind} {target.arch}",
            why=f"its kernels need asynchronous copies and tensor cores as of sm_{_OLDEST} (Ampere)",
            todo=f"choose sm_{_OLDEST} or later; `graphopt targets` lists presets",
        )
    from tvm import target as targets

    limits = {
        "max_num_threads": 1024,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "registers_per_block": 65536,
        "max_shared_memory_per_block": 48 << 10,
    }
    host = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}
    return targets.Target({"kind": "cuda", "arch": target.arch, **limits}, host=host)
