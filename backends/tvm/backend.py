"""The TVM backend: what it supports, and how a Target becomes one of TVM's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.backend import Artifact, Backend, Unsupported, refuse
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.errors import UnsupportedError
from graphopt.target import Target, this_machine

if TYPE_CHECKING:
    from graphopt.backends.tvm.importer import Imported
    from graphopt.model import Model

__all__ = ["TvmBackend", "tvm_target"]

_LLVM_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


class TvmBackend(Backend):
    """Compiles a model into native code with Apache TVM; sizes that are free in the model stay free."""

    name: ClassVar[str] = "tvm"

    def supports(self, model: Model) -> list[Unsupported]:
        return self._imported(model, this_machine(), 1).unsupported

    def compile(self, model: Model, target: Target, *, threads: int | None = None) -> Artifact:
        from graphopt.backends.tvm.runtime import use_threads

        machine = tvm_target(target)
        count = threads or target.cores
        imported = self._imported(model, target, count)
        if imported.unsupported:
            raise refuse(self.name, imported.unsupported)
        use_threads(count)  # compiling runs code too, to fold constants
        from graphopt.backends.tvm.kernels.machine import Machine
        from graphopt.backends.tvm.lower import build

        built = build(imported.module, machine, Machine.of(target, count))
        runs_here = _runs_here(target)
        module = built.executable.jit() if runs_here else None
        return TvmArtifact(model.signature, target, count, module, built.weights, built.executable)

    @classmethod
    def load(cls, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        from graphopt.backends.tvm.saved import load_from

        return load_from(directory, manifest)

    def _imported(self, model: Model, target: Target, threads: int) -> Imported:
        from graphopt.backends.tvm.importer import import_program, prepare
        from graphopt.backends.tvm.kernels.machine import Machine
        from graphopt.export import to_exported_program

        return import_program(prepare(to_exported_program(model)), Machine.of(target, threads))


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

    return targets.Target(
        {"kind": "llvm", "mtriple": _LLVM_TRIPLES[target.arch], "mcpu": target.cpu, "num-cores": target.cores}
    )


def _runs_here(target: Target) -> bool:
    here = this_machine()
    return target.arch == here.arch and set(target.features) <= set(here.features)
