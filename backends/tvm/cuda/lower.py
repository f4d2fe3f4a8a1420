"""From a Relax module to GPU code: legalize, fuse, take the weights out, write or schedule kernels, capture graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx, transform
from tvm import target as tvm_target

from graphopt.backends.tvm.cuda.attention import attention_kernel
from graphopt.backends.tvm.cuda.general import schedule
from graphopt.backends.tvm.cuda.gpu import Gpu
from graphopt.backends.tvm.cuda.pipeline import GPU_CODE
from graphopt.backends.tvm.cuda.product import product_kernel
from graphopt.backends.tvm.cuda.rows import rows_kernel
from graphopt.backends.tvm.cuda.window import window_kernel
from graphopt.backends.tvm.kernels.coverage import GENERAL, Coverage
from graphopt.backends.tvm.kernels.fused import Fused, read_fused
from graphopt.backends.tvm.repeats import keep_repeats_apart
from graphopt.backends.tvm.weights import take_weights_out

__all__ = ["RULES", "BuiltForGpu", "build"]

RULES: tuple[Callable[[Fused, Gpu], Any | None], ...] = (
    product_kernel,
    attention_kernel,
    rows_kernel,
    window_kernel,
)
"""Rules that write kernels; what none takes is scheduled by TVM's own rules for GPUs."""


@dataclass
class BuiltForGpu:
    """An executable whose function `main` takes the user's inputs and then the weights.

    Attributes:
        source: the CUDA source of its kernels; empty when there are none.
        coverage: which rule wrote each of its functions.
    """

    executable: Any
    weights: list[Any]
    source: str
    coverage: Coverage


def build(module: IRModule, target: tvm_target.Target, gpu: Gpu) -> BuiltForGpu:
    """Generate the code of a module that the importer made. Needs neither a GPU nor nvcc."""
    with (
        target,
        transform.PassContext(opt_level=3, config={"relax.backend.use_cuda_graph": True, "tirx.disable_assert": True}),
    ):
        module = keep_repeats_apart(_LEGALIZE(module))
        inputs = len(module["main"].params)
        module, weights = take_weights_out(_FUSE(module))
        module = _with_attribute(module, "num_input", inputs)
        module = relax.transform.RewriteDataflowReshape()(relax.backend.DispatchSortScan()(module))
        module = relax.transform.DeadCodeElimination()(module)
        module, coverage = scheduled(module, gpu)
        module = _TO_MACHINE(module)
        executable = relax.build(module, target, relax_pipeline=None, tir_pipeline=GPU_CODE)
    return BuiltForGpu(executable, weights, source_of(executable.mod), coverage)


_LEGALIZE = transform.Sequential(
    [
        relax.transform.DeadCodeElimination(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.RewriteDataflowReshape(),  # moves nothing, so it must not become part of a kernel
        relax.transform.CanonicalizeBindings(),  # a second name for a value would end what is fused
        relax.transform.DeadCodeElimination(),
    ]
)

_FUSE = transform.Sequential(
    [
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
)

_TO_MACHINE = transform.Sequential(
    [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.RewriteCUDAGraph(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
)
"""As for a CPU; and stretches of kernels whose memory is planned are captured as CUDA graphs at the first call."""


def scheduled(module: IRModule, gpu: Gpu) -> tuple[IRModule, Coverage]:
    """Write or schedule every function of a module for a GPU, and tell what wrote each."""
    functions, taken = dict(module.functions), {}
    for place, function in functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        taken[place.name_hint], kernel = _written(function, gpu)
        if kernel is not None:
            functions[place] = kernel.with_attr("tirx.is_scheduled", True)
    module = schedule(IRModule(functions, module.attrs))
    return tirx.transform.ConvertSSA()(module), Coverage.of(taken)


def _written(function: tirx.PrimFunc, gpu: Gpu) -> tuple[str, Any | None]:
    fused = read_fused(function)
    if fused is not None:
        for rule in RULES:
            kernel = rule(fused, gpu)
            if kernel is not None:
                return rule.__name__.removesuffix("_kernel"), kernel
    return GENERAL, None


def _with_attribute(module: IRModule, name: str, value: int) -> IRModule:
    main = module["main"].with_attr(name, value)
    return IRModule({**module.functions, module.get_global_var("main"): main}, module.attrs)


def source_of(module: Any) -> str:
    """The CUDA source in a module or what it imports."""
    if module.kind == "cuda":
        return str(module.inspect_source())
    return "".join(source_of(imported) for imported in module.imports)
