"""Native code for the functions of a compiled graph: an ordered list of rules, each of which takes what it knows.

A rule reads a fused function and returns it rewritten as a loop nest, or None for "not mine". What no rule takes is
scheduled by the general schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import IRModule, tirx

from graphopt.backends.tvm.kernels.attention import attention_kernel
from graphopt.backends.tvm.kernels.concatenation import concatenation_kernel
from graphopt.backends.tvm.kernels.convolution import convolution_kernel
from graphopt.backends.tvm.kernels.coverage import GENERAL, Coverage
from graphopt.backends.tvm.kernels.depthwise import depthwise_kernel
from graphopt.backends.tvm.kernels.elementary import BY_LIBRARY, depends_on_condition
from graphopt.backends.tvm.kernels.elementwise import elementwise_kernel
from graphopt.backends.tvm.kernels.expanded import expanded_kernel
from graphopt.backends.tvm.kernels.fused import Fused, read_fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.matmul import matmul_kernel
from graphopt.backends.tvm.kernels.normalization import normalization_kernel
from graphopt.backends.tvm.kernels.product import product_kernel
from graphopt.backends.tvm.kernels.reduction import reduction_kernel
from graphopt.backends.tvm.kernels.strassen import strassen_kernel
from graphopt.backends.tvm.kernels.winograd import winograd_kernel
from graphopt.backends.tvm.schedule import ELEMENTARY, holds_bfloat16, schedule_function

__all__ = ["RULES", "scheduled", "written"]

RULES: tuple[Callable[[Fused, Machine], Any | None], ...] = (
    product_kernel,
    strassen_kernel,
    convolution_kernel,
    winograd_kernel,
    depthwise_kernel,
    reduction_kernel,
    concatenation_kernel,
    normalization_kernel,
    attention_kernel,
    matmul_kernel,
)


def scheduled(module: IRModule, machine: Machine) -> tuple[IRModule, Coverage]:
    """Write or schedule every function of a module for parallel vector code, and tell what wrote each."""
    functions, taken = dict(module.functions), {}
    for place, function in functions.items():
        if isinstance(function, tirx.PrimFunc):
            taken[place.name_hint], kernel = written(function, machine.for_function(function))
            functions[place] = kernel.with_attr(BY_LIBRARY, True) if machine.exact else kernel
    return tirx.transform.ConvertSSA()(IRModule(functions, module.attrs)), Coverage.of(taken)


def written(function: tirx.PrimFunc, machine: Machine) -> tuple[str, tirx.PrimFunc]:
    """The name of the rule that took a function, and what it made of it, by the choices that the machine comes with."""
    if holds_bfloat16(function.body):
        # TVM has no vectors of bfloat16, and loses it in longer expressions.
        return GENERAL, schedule_function(function)
    if any(isinstance(size, tirx.IntImm) and int(size) == 0 for size in function.params[-1].shape):
        return GENERAL, function  # nothing to compute
    both = expanded_kernel(function, machine)
    if both is not None:
        return _name(expanded_kernel), both
    fused = read_fused(function)
    if fused is not None:
        for rule in RULES:
            kernel = rule(fused, machine)
            if kernel is not None:
                return _name(rule), kernel
    by_library = machine.exact or depends_on_condition(function.body)
    vector_calls = [] if by_library else [f"{name}:float32" for name in ELEMENTARY]
    kernel = elementwise_kernel(function, machine, vector_calls)
    if kernel is not None:
        return _name(elementwise_kernel), kernel
    return GENERAL, schedule_function(function, vector_calls)


def _name(rule: Callable[..., Any]) -> str:
    return rule.__name__.removesuffix("_kernel")
