"""The TVM backend: what it supports, and how a Target becomes one of TVM's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphopt import cpus
from graphopt.backend import Artifact, Backend, Unsupported, refuse
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.errors import UnsupportedError, UsageError
from graphopt.target import Target, this_machine, why_not_here

if TYPE_CHECKING:
    from graphopt.backends.tvm.importer import Imported
    from graphopt.backends.tvm.kernels.choices import Tuned
    from graphopt.backends.tvm.kernels.machine import Machine
    from graphopt.model import Model

__all__ = ["TvmBackend", "tvm_target"]

_LLVM_TRIPLES = {
    "x86_64": "x86_64-linux-gnu",
    "aarch64": "aarch64-linux-gnu",
    "armv7": "armv7a-linux-gnueabihf",
    "riscv64": "riscv64-linux-gnu",
}

_ABI = {"armv7": {"mfloat-abi": "hard"}, "riscv64": {"mabi": "lp64d"}}
"""How floating-point arguments are passed, where LLVM would not choose what Linux has."""


class TvmBackend(Backend):
    """Compiles a model into native code with Apache TVM; sizes that are free in the model stay free."""

    name: ClassVar[str] = "tvm"
    exact_float: ClassVar[Literal["option", "always", "never"]] = "option"
    tunes: ClassVar[bool] = True

    def supports(self, model: Model) -> list[Unsupported]:
        from graphopt.backends.tvm.kernels.machine import Machine

        return self._imported(model, Machine.of(this_machine(), 1)).unsupported

    def compile(
        self,
        model: Model,
        target: Target,
        *,
        threads: int | None = None,
        exact_float: bool = False,
        tuned: Tuned | str | os.PathLike[str] | None = None,
    ) -> Artifact:
        """As any backend does.

        Args:
            tuned: measured choices, or the database that `graphopt tune` keeps them in; for CPUs.
        """
        if target.kind == "cuda":
            if tuned is not None:
                raise UsageError("choices are measured for CPUs only", todo="leave --tuned (tuned=...) out")
            return self._for_gpu(model, target, exact_float=exact_float)
        from graphopt.backends.tvm.kernels.machine import Machine
        from graphopt.backends.tvm.runtime import use_threads

        compiled_for = tvm_target(target)
        count = threads or target.cores
        machine = Machine.of(target, count, exact=exact_float)
        record: dict[str, Any] = {}
        if tuned is not None:
            from graphopt.backends.tvm.tune.chosen import chosen

            machine, record["tuned"] = chosen(model, target, machine, tuned)
        imported = self._imported(model, machine)
        if imported.unsupported:
            raise refuse(self.name, imported.unsupported)
        use_threads(count)  # compiling runs code too, to fold constants
        from graphopt.backends.tvm.lower import build
        from graphopt.backends.tvm.memory import move_together

        built = build(imported.module, compiled_for, machine)
        module = built.executable.jit() if why_not_here(target) is None else None
        if module is not None:
            move_together(built.weights)
        made = TvmArtifact(model.signature, target, count, module, built.weights, built, exact_float=exact_float)
        made.record |= record
        return made

    def _for_gpu(self, model: Model, target: Target, *, exact_float: bool) -> Artifact:
        from graphopt.backends.tvm.cuda.compile import compile_for_gpu, generate

        if exact_float:
            raise UnsupportedError(
                f"exact floating point is not known for {target.kind} {target.arch}",
                why="products of float32 are made of three shorter ones on tensor cores, which round a little more",
                todo="leave --exact-float (exact_float=True) out, or build for a CPU",
            )
        built, unsupported = generate(model, target)
        if built is None:
            raise refuse(self.name, unsupported)
        return compile_for_gpu(model, target, built)

    @classmethod
    def require_parts(cls, target: Target) -> None:
        if target.kind == "cuda":
            return
        from graphopt.backends.tvm.bundle import toolchain, wheels

        tvm_target(target)
        toolchain.compiler(target.arch)
        wheels.libraries(target.arch)

    @classmethod
    def load(cls, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        from graphopt.backends.tvm.saved import load_from

        return load_from(directory, manifest)

    def _imported(self, model: Model, machine: Machine) -> Imported:
        from graphopt.backends.tvm.importer import import_model

        return import_model(model, machine)


def tvm_target(target: Target) -> Any:
    """The TVM target of a CPU.

    Raises:
        UnsupportedError: for a kind that this backend has no schedules for.
    """
    if target.arch not in _LLVM_TRIPLES:
        raise UnsupportedError(
            f"the backend 'tvm' compiles for CPUs so far, not for {target.kind} {target.arch}",
            todo="choose a CPU target; `graphopt targets` lists them",
        )
    from tvm import target as targets

    more = set(target.features) - cpus.features_of(target.arch, target.cpu)
    return targets.Target(
        {
            "kind": "llvm",
            "mtriple": _LLVM_TRIPLES[target.arch],
            "mcpu": target.cpu,
            "mattr": [f"+{name}" for name in cpus.llvm_names(target.arch, more)],
            "num-cores": target.cores,
            **_ABI.get(target.arch, {}),
        }
    )
