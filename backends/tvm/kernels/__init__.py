"""Native code for the functions of a compiled graph: an ordered list of rules, each of which takes what it knows.

A rule reads a fused function and returns it rewritten as a loop nest, or None for "not mine". What no rule takes is
scheduled by the general schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import IRModule, tirx

from graphopt.backends.tvm.kernels.concatenation import concatenation_kernel
from graphopt.backends.tvm.kernels.convolution import convolution_kernel
from graphopt.backends.tvm.kernels.depthwise import depthwise_kernel
from graphopt.backends.tvm.kernels.elementary import in_arithmetic
from graphopt.backends.tvm.kernels.fused import Fused, read_fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import product_kernel
from graphopt.backends.tvm.kernels.reduction import reduction_kernel
from graphopt.backends.tvm.kernels.winograd import winograd_kernel
from graphopt.backends.tvm.schedule import ELEMENTARY, holds_bfloat16, schedule_function

__all__ = ["RULES", "scheduled"]

RULES: tuple[Callable[[Fused, Machine], Any | None], ...] = (
    product_kernel,
    convolution_kernel,
    winograd_kernel,
    depthwise_kernel,
    reduction_kernel,
    concatenation_kernel,
)


def scheduled(module: IRModule, machine: Machine) -> IRModule:
    """Write or schedule every function of a module for parallel vector code."""
    functions = {
        name: _scheduled(function, machine) if isinstance(function, tirx.PrimFunc) else function
        for name, function in module.functions.items()
    }
    return tirx.transform.ConvertSSA()(IRModule(functions, module.attrs))


def _scheduled(function: tirx.PrimFunc, machine: Machine) -> tirx.PrimFunc:
    if holds_bfloat16(function.body):
        return schedule_function(function)  # TVM has no vectors of bfloat16, and loses it in longer expressions
    fused = read_fused(function)
    if fused is not None:
        for rule in RULES:
            kernel = rule(fused, machine)
            if kernel is not None:
                return _in_arithmetic(kernel)
    return _in_arithmetic(schedule_function(function, [f"{name}:float32" for name in ELEMENTARY]))


def _in_arithmetic(function: tirx.PrimFunc) -> tirx.PrimFunc:
    return function.with_body(in_arithmetic(function.body))
