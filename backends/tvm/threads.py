"""The threads that run a compiled library's parallel loops.

TVM's own pool gives every thread a fixed part of a loop and waits for all of them. Where the machine has other work to
do, the caller waits at every loop for a thread that the system does not let run: a model of sixty loops became fifty
times slower beside two busy processes. Here a loop is cut into more tasks than threads, and whoever runs takes the
next one, the caller too. Threads without work spin for about half a millisecond and then sleep.

Atomic operations do not exist in TIR. They are written in LLVM's language, in threads.ll, and become part of every
library, so that a saved one needs nothing else.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from tvm import IRModule, ir, tirx

from graphopt.backends.tvm.runtime import START_THREADS, STOP_THREADS

__all__ = ["with_threads"]

_TASKS_PER_THREAD = 4
_SPINNING, _PATIENCE = 500_000, 500_000
"""Nanoseconds: how long a thread waits for work before it sleeps, and how long the caller for the others. Who sleeps is
woken late: with a fifth of this patience, one sleep led to the next, and a small model took half as long again."""


def _calls(**numbers: int) -> dict[str, str]:
    return {name: str(number) for name, number in numbers.items()}


_MACHINES: dict[str, dict[str, str]] = {
    "x86_64": {"pause": "pause", "word": "i64"} | _calls(futex=202, set_affinity=203, affinity_of=204, thread_id=186),
    "aarch64": {"pause": "yield", "word": "i64"} | _calls(futex=98, set_affinity=122, affinity_of=123, thread_id=178),
    "armv7": {"pause": "yield", "word": "i32"} | _calls(futex=240, set_affinity=241, affinity_of=242, thread_id=224),
    "riscv64": {"pause": "nop", "word": "i64"} | _calls(futex=98, set_affinity=122, affinity_of=123, thread_id=178),
}

_C_CALL = 3
"""The calling convention of a function whose arguments are as its parameters say."""


def with_threads(module: IRModule, arch: str) -> IRModule:
    """The module with functions that start and stop threads of its own (`runtime.START_THREADS`, `STOP_THREADS`)."""
    count = tirx.Var("count", "int32")
    source, word = ir.StringImm(_source(arch)), _MACHINES[arch]["word"].replace("i", "int")
    start = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", source, _call("graphopt_start_body", count))
    functions = {
        START_THREADS: tirx.PrimFunc([count], start),
        STOP_THREADS: tirx.PrimFunc([], _call("graphopt_finish_body")),
        "graphopt_worker": _with_address("graphopt_worker_body", word),
        "graphopt_launch": _with_address("graphopt_launch_body", word, word, "int32"),
    }
    named = {ir.GlobalVar(name): f.with_attr("global_symbol", name) for name, f in functions.items()}
    return IRModule({**module.functions, **named}, module.attrs)


def _call(name: str, *arguments: Any) -> Any:
    return tirx.Evaluate(tirx.call_extern("int32", name, *arguments))


def _with_address(body: str, *parameters: str) -> tirx.PrimFunc:
    """A function that others may point to; TVM keeps imported functions only where they are called."""
    arguments = [tirx.Var(f"argument_{i}", dtype) for i, dtype in enumerate(parameters)]
    code = tirx.SeqStmt([_call(body, *arguments), tirx.stmt.Return(tirx.const(0, "int32"))])
    return tirx.PrimFunc(arguments, code, ret_type=ir.PrimType("int32")).with_attr("calling_conv", _C_CALL)


@cache
def _source(arch: str) -> str:
    text = files("graphopt.backends.tvm").joinpath("threads.ll").read_text(encoding="utf-8")
    numbers = {"chunks": _TASKS_PER_THREAD, "spinning": _SPINNING, "patience": _PATIENCE}
    return Template(text).substitute(_MACHINES[arch], **numbers)
