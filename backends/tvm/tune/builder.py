"""A process that compiles candidates: several kernels of one function into one library.

Request: `function` (TVM's JSON), `candidates` (choices), `target` (JSON text), `threads`, `exact`, `library` (a path).
Answer: `names`, the function in the library of each candidate, which equal ones share, or null; `errors`, why null.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["compiled", "respond"]


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """Compile what is asked for."""
    from graphopt.backends.tvm.kernels.choices import Choices

    try:
        candidates = [Choices.from_json(choices) for choices in request["candidates"]]
        where = str(request["target"]), int(request["threads"]), bool(request["exact"])
        return compiled(str(request["function"]), candidates, where, Path(request["library"]))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def compiled(text: str, candidates: Sequence[Any], where: tuple[str, int, bool], library: Path) -> dict[str, Any]:
    """Write the kernels of a function into a library; returns the answer."""
    import tvm_ffi
    from tvm import IRModule, ir, tirx, transform
    from tvm import compile as tvm_compile

    from graphopt.backends.tvm.backend import tvm_target
    from graphopt.backends.tvm.bundle import toolchain
    from graphopt.backends.tvm.kernels import written
    from graphopt.backends.tvm.pipeline import CPU_CODE
    from graphopt.backends.tvm.threads import with_threads

    target, machine = _known(*where)
    function = ir.load_json(text)
    kind, _ = written(function, machine)
    kernels: dict[str, Any] = {}
    names: list[str | None] = []
    errors: list[str | None] = []
    known: dict[int, str] = {}
    for number, choices in enumerate(candidates):
        try:
            rule, kernel = written(function, replace(machine, choices=choices))
            if rule != kind:
                raise ValueError(f"the rule '{rule}' took it, not '{kind}'")
        except Exception as error:
            names.append(None)
            errors.append(f"{type(error).__name__}: {error}"[:300])
            continue
        name = known.setdefault(tvm_ffi.structural_hash(kernel), f"candidate_{number}")
        names.append(name)
        errors.append(None)
        kernels.setdefault(name, kernel.with_attr("global_symbol", name))
    module = with_threads(tirx.transform.ConvertSSA()(IRModule(kernels)), machine.arch)
    with transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": True}):
        executable = tvm_compile(module, target=tvm_target(target), tir_pipeline=CPU_CODE)
    toolchain.link(executable, library, target.arch)
    return {"kind": kind, "names": names, "errors": errors}


@cache
def _known(target: str, threads: int, exact: bool) -> tuple[Any, Any]:
    from graphopt.backends.tvm.kernels.machine import Machine
    from graphopt.target import Target

    parsed = Target.parse(target)
    return parsed, Machine.of(parsed, threads, exact=exact)


if __name__ == "__main__":
    import graphopt.backends.tvm.kernels  # noqa: F401 - three seconds before the first request, not within it
    from graphopt.backends.tvm.tune.worker import serve

    serve(respond)
    sys.exit(0)
