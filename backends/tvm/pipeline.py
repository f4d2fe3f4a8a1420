"""The passes from loop nests to what LLVM takes.

TVM's own list is meant for every target: it runs passes for GPU memory, tensor cores and asynchronous copies, and
simplifies six times. Here are those that CPU code needs, and of them only functions that still have blocks (made by
the general schedule) meet the passes that remove blocks. Compiling takes half the time of TVM's list.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, ir, s_tir, tirx, transform
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
from tvm.tirx.compilation_pipeline import register_tir_pipeline

from graphopt.backends.tvm.kernels.elementary import in_arithmetic

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


def _vectorized() -> Any:
    return transform.Sequential(
        [
            # First of all: FlattenBuffer makes wrong indices of sums of quotients that are not in simplest form.
            tirx.transform.StmtSimplify(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.BF16ComputeLegalize(),
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
    module = _vectorized()(IRModule(functions, module.attrs))
    functions = {place: f.with_body(in_arithmetic(f.body)) for place, f in module.functions.items()}
    return _callable()(IRModule(functions, module.attrs))


# TVM knows that exp, sigmoid and tanh may stay in vectors until they are written out; it is not told of erf.
ir.register_op_attr("tirx.erf", "TVectorizable", True)
register_tir_pipeline(CPU_CODE, lambda: (_cpu_code, finalize_host_passes, finalize_device_passes))
