"""The passes from loop nests to what LLVM takes.

TVM's own list is meant for every target: it runs passes for GPU memory, tensor cores and asynchronous copies, and
simplifies six times. Here are those that CPU code needs, and of them only functions that still have blocks (made by
the general schedule) meet the passes that remove blocks. Compiling takes half the time of TVM's list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, s_tir, tirx, transform
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
from tvm.tirx.compilation_pipeline import register_tir_pipeline

from graphopt.backends.tvm.flatten import flat
from graphopt.backends.tvm.kernels.elementary import BY_LIBRARY, depends_on_condition, in_arithmetic, in_library

__all__ = ["CPU_CODE"]

CPU_CODE = "graphopt.cpu"
"""The name of this list, for `tvm.compile(..., tir_pipeline=CPU_CODE)`."""


def _without_blocks() -> Any:
    return transform.Sequential(
        [
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.CompactBufferAllocation(),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.LowerOpaqueBlock(),
        ]
    )


def _flat() -> Any:
    return transform.Sequential(
        [
            # First of all: in sums of quotients in their simplest form `flat` sees what it must hide.
            tirx.transform.StmtSimplify(),
            flat,
            tirx.transform.BF16ComputeLegalize(),
        ]
    )


def _vectorized() -> Any:
    return transform.Sequential(
        [
            tirx.transform.NarrowDataType(32),
            tirx.transform.VectorizeLoop(),
            tirx.transform.UnrollLoop(),
            # LLVM would find what this finds, but in twice the time.
            tirx.transform.StmtSimplify(),
        ]
    )


def _callable() -> Any:
    return transform.Sequential(
        [
            s_tir.transform.RewriteUnsafeSelect(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            # Every function would check its arguments again, with a text for every case: a third of the code. Inputs
            # are checked against the signature, and the virtual machine checks the sizes that they share.
            tirx.transform.SkipAssert(),
            tirx.transform.BF16StorageLegalize(),
        ]
    )


def _has_blocks(function: tirx.PrimFunc) -> bool:
    found = False

    def note(_block: Any) -> None:
        nonlocal found
        found = True

    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, note))
    return found


@transform.module_pass(opt_level=0, name="graphopt.cpu_code")  # type: ignore[untyped-decorator]  # TVM has no types
def _cpu_code(module: IRModule, _context: Any) -> IRModule:
    functions = dict(module.functions)
    blocks = {place: function for place, function in functions.items() if _has_blocks(function)}
    functions.update(_without_blocks()(IRModule(blocks, module.attrs)).functions)
    module = _flat()(IRModule(functions, module.attrs))
    module = _vectorized()(_each(module, _by_library))
    return _callable()(_each(module, _by_arithmetic))


def _each(module: IRModule, change: Callable[[tirx.PrimFunc], tirx.PrimFunc]) -> IRModule:
    return IRModule({place: change(function) for place, function in module.functions.items()}, module.attrs)


def _by_library(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Calls of elementary functions made calls of the library, where they must be; of bfloat16 they are float32 now."""
    if BY_LIBRARY in function.attrs or depends_on_condition(function.body):
        return function.with_body(in_library(function.body)).with_attr(BY_LIBRARY, True)
    return function


def _by_arithmetic(function: tirx.PrimFunc) -> tirx.PrimFunc:
    return function if BY_LIBRARY in function.attrs else function.with_body(in_arithmetic(function.body))


# TVM knows that exp, sigmoid and tanh may stay in vectors until they are written out; it is not told of erf.
ir.register_op_attr("tirx.erf", "TVectorizable", True)
register_tir_pipeline(CPU_CODE, lambda: (_cpu_code, finalize_host_passes, finalize_device_passes))
