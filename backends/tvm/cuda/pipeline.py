"""The passes from loop nests to CUDA.

Scheduled functions, which have blocks, go through TVM's own list. Kernels that were written out have none, and must
not: the list would cut their shared memory down to what it sees used, which is not what the called code uses.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, s_tir, tirx, transform
from tvm.s_tir.pipeline import default_s_tir_pipeline, finalize_device_passes, finalize_host_passes
from tvm.tirx.compilation_pipeline import register_tir_pipeline

from graphopt.backends.tvm.flatten import flat, hide, show

__all__ = ["GPU_CODE"]

GPU_CODE = "graphopt.cuda"
"""The name of this list, for `tvm.compile(..., tir_pipeline=GPU_CODE)`."""


def _written_code() -> Any:
    return transform.Sequential(
        [
            tirx.transform.StmtSimplify(),
            flat,
            tirx.transform.BF16ComputeLegalize(),
            tirx.transform.NarrowDataType(32),
            tirx.transform.VectorizeLoop(),
            tirx.transform.UnrollLoop(),
            tirx.transform.StmtSimplify(),
            tirx.transform.CommonSubexprElim(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            tirx.transform.BF16StorageLegalize(),
        ]
    )


@transform.module_pass(opt_level=0, name="graphopt.cuda_code")  # type: ignore[untyped-decorator]  # TVM has no types
def _gpu_code(module: IRModule, _context: Any) -> IRModule:
    functions: dict[Any, Any] = {}
    scheduled = {place: function for place, function in module.functions.items() if _has_blocks(function)}
    written = {place: function for place, function in module.functions.items() if place not in scheduled}
    if scheduled:
        hidden = hide(IRModule(scheduled, module.attrs))
        functions.update(show(default_s_tir_pipeline()[0](hidden)).functions)
    if written:
        functions.update(_written_code()(IRModule(written, module.attrs)).functions)
    return IRModule(functions, module.attrs)


def _has_blocks(function: Any) -> bool:
    found = False

    def note(_block: Any) -> None:
        nonlocal found
        found = True

    if isinstance(function, tirx.PrimFunc):
        tvm_ffi.structural_walk(function.body, (s_tir.SBlock, note))
    return found


register_tir_pipeline(GPU_CODE, lambda: (_gpu_code, finalize_host_passes, finalize_device_passes))
