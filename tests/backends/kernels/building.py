"""Kernels built by themselves: a specification, what follows it, a rule, and the machine code that comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from tvm import IRModule, s_tir, te, tirx, transform
from tvm import compile as tvm_compile

import graphopt.backends.tvm.operators  # noqa: F401  # fills the table before a kernel is imported by itself
from graphopt.backends.tvm.backend import tvm_target
from graphopt.backends.tvm.kernels.fused import read_fused
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import packed_vectors
from graphopt.backends.tvm.pipeline import CPU_CODE
from graphopt.backends.tvm.runtime import ffi, use_threads
from graphopt.target import this_machine

Rule = Callable[[Any, Machine], Any]
Library = Callable[..., Tensor]


def examples(count: int) -> Any:
    """Settings of a property test: the same examples in every run, compiled one by one."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def a_machine(lanes: int = 8, threads: int = 1, l2: int = 512 << 10, multiply_adds: int = 2) -> Machine:
    """A machine of the usual size; sixteen lanes come with 32 registers, and run on narrower vectors too."""
    return Machine(lanes, 32 if lanes == 16 else 16, 32 << 10, l2, threads, multiply_adds=multiply_adds)


def operand(*shape: Any, dtype: str = "float32", name: str = "x") -> te.Tensor:
    return te.placeholder(shape, dtype, name)


def size(name: str = "n") -> Any:
    """A size that is known when the code runs."""
    return tirx.Var(name, "int64")


def apply(rule: Rule, machine: Machine, operands: Sequence[te.Tensor], result: te.Tensor) -> Any | None:
    """What the rule makes of the function from operands to result; None when it refuses."""
    fused = read_fused(s_tir.renew_defs(te.create_prim_func([*operands, result], "int64")))
    return None if fused is None else rule(fused, machine)


def compiled(functions: Mapping[str, Any]) -> dict[str, Library]:
    """Machine code of several functions in one library; each takes its operands and the shape of the result."""
    assert all(function is not None for function in functions.values()), "refused"
    named = {name: f.without_attr("global_symbol").with_attr("global_symbol", name) for name, f in functions.items()}
    module = tirx.transform.ConvertSSA()(IRModule(named))
    use_threads(1)
    with transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        library = tvm_compile(module, target=tvm_target(this_machine()), tir_pipeline=CPU_CODE).jit()
    return {name: _callable(library[name]) for name in functions}


def built(rule: Rule, machine: Machine, operands: Sequence[te.Tensor], result: te.Tensor) -> Library:
    """Machine code of one kernel."""
    return compiled({"kernel": apply(rule, machine, operands, result)})["kernel"]


def _callable(function: Any) -> Library:
    def run(*tensors: Tensor, shape: Sequence[int]) -> Tensor:
        whole, result = _between(_ORDINARY, torch.full(tuple(shape), _ODD))
        inputs = [_between(_ODD, tensor)[1] for tensor in tensors]
        function(*(ffi().from_dlpack(tensor) for tensor in (*inputs, result)))
        for guard in (whole[:_GUARD], whole[-_GUARD:]):
            assert bool((guard == _ORDINARY).all()), "written outside of the result"
        return result

    return run


_GUARD = 64
"""Elements before and after each tensor: a multiple of any alignment, and what a wrong index would meet."""

_ODD = float("nan")
"""What is around operands, and in a result before it is written: no result may depend on it."""

_ORDINARY = 57.0
"""What is around a result: not what is around operands, which a kernel that reads too far would write there."""


def _between(around: float, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Memory that begins and ends with a number, and the copy of a tensor within it."""
    whole = torch.full((_GUARD + tensor.numel() + _GUARD,), around)
    inner = whole[_GUARD:-_GUARD].view(tensor.shape)
    inner.copy_(tensor)
    return whole, inner


def packed(weight: Tensor, groups: int, lanes: int) -> Tensor:
    """weight [out, ..., in] as vectors of outputs, [groups * vectors, ..., in, lanes]; missing lanes hold NaN.

    No kernel may let a missing lane reach a result.
    """
    per_group = len(weight) // groups
    vectors = []
    for group in weight.split(per_group):
        for start in packed_vectors(per_group, lanes):
            vector = weight.new_full((*weight.shape[1:], lanes), float("nan"))
            part = group[start : start + lanes].movedim(0, -1)
            vector[..., : part.shape[-1]] = part
            vectors.append(vector)
    return torch.stack(vectors)


def bias_residual_relu(result: te.Tensor, bias: te.Tensor, residual: te.Tensor) -> te.Tensor:
    """relu(result + bias + residual), in three blocks as the compiler fuses them; bias lies along the last axis."""
    biased = te.compute(result.shape, lambda *i: result(*i) + bias(i[-1]), name="biased")
    summed = te.compute(result.shape, lambda *i: biased(*i) + residual(*i), name="summed")
    zero = tirx.const(0, "float32")
    return te.compute(result.shape, lambda *i: tirx.Select(summed(*i) < zero, zero, summed(*i)), name="relu")
