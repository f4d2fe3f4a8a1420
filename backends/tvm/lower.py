"""From a Relax module to machine code: legalize, fold, fuse, take the weights out, schedule, build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx, transform
from tvm import target as tvm_target

from graphopt.backends.tvm.chains import chained
from graphopt.backends.tvm.kernels import scheduled
from graphopt.backends.tvm.kernels.choices import task_key
from graphopt.backends.tvm.kernels.coverage import Coverage
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.pipeline import CPU_CODE
from graphopt.backends.tvm.repeats import keep_repeats_apart
from graphopt.backends.tvm.threads import with_threads
from graphopt.backends.tvm.weights import check_apart, take_weights_out
from graphopt.backends.tvm.work import Work, work_of

__all__ = ["Built", "build", "fused"]


@dataclass
class Built:
    """An executable whose function `main` takes the user's inputs and then the weights, and `check_weights` these.

    Attributes:
        coverage: which rule wrote each of its functions.
        work: how much each of its functions computes and moves.
        tasks: the key of each function, by which measured choices are found.
    """

    executable: Any
    weights: list[Any]
    coverage: Coverage
    work: dict[str, Work]
    tasks: dict[str, str]


def build(module: IRModule, target: tvm_target.Target, machine: Machine) -> Built:
    """Compile the module that the importer made."""
    with target, transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": True}):
        module, weights = fused(module, target, machine)
        functions = {place.name_hint: f for place, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
        work = {name: work_of(function) for name, function in functions.items()}
        tasks = {name: task_key(function) for name, function in functions.items()}
        module, coverage = scheduled(module, machine)
        module = check_apart(_sizes_in_order(_TO_MACHINE(module)), len(weights))
        module = with_threads(module, machine.arch)
        executable = relax.build(module, target, relax_pipeline=None, tir_pipeline=CPU_CODE)
    return Built(executable, weights, coverage, work, tasks)


def fused(module: IRModule, target: tvm_target.Target, machine: Machine) -> tuple[IRModule, list[Any]]:
    """What the importer made, as functions that kernels are written for, and the weights that `main` takes last."""
    with target, transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": True}):
        module = transform.Sequential(
            [
                relax.transform.DeadCodeElimination(),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
            ]
        )(module)
        module = keep_repeats_apart(module)
        module = transform.Sequential(
            [
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(),
            ]
        )(module)
        module = relax.transform.DeadCodeElimination()(chained(module, machine))
        module, weights = take_weights_out(module)
        module = relax.transform.RewriteDataflowReshape()(relax.backend.DispatchSortScan()(module))
        return relax.transform.DeadCodeElimination()(module), weights


_TO_MACHINE = transform.Sequential(
    [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
)
"""From dataflow to code for the virtual machine: memory planned and reused, shapes computed, calls made explicit."""


def _sizes_in_order(module: IRModule) -> IRModule:
    """Functions that compute sizes, with what they store in the order of its places.

    TVM lists these statements, which do not depend on one another, in the order of addresses in its memory, which
    differs from run to run; the same model is to give the same code.
    """
    functions = dict(module.functions)
    for place, function in functions.items():
        if isinstance(function, tirx.PrimFunc) and place.name_hint.startswith("shape_func"):
            stores = getattr(function.body, "seq", ())
            if len(stores) > 1 and all(isinstance(store, tirx.BufferStore) for store in stores):
                ordered = sorted(stores, key=lambda store: int(store.indices[0]))
                functions[place] = function.with_body(tirx.SeqStmt(ordered))
    return IRModule(functions, module.attrs)
