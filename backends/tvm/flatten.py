"""Buffers of several axes made flat, by TVM's pass, with the indices hidden from it that it gets wrong.

FlattenBuffer looks at an index as a map of loops, split and fused. That finds the plain index behind a chain of
reshapes, but of quotients of anything else than positive multiples of loops it can make another map. Of two rolled
axes, `(i // 4 + 3) % 4 * 4 + (i % 4 + 3) % 4`, it makes `(i + 12) % 16`; of `(11 - i % 36 // 3) // 4` quotients with
negative divisors; with three pads around the edges it does not come to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, tirx, transform

__all__ = ["flat", "hide", "show"]

_HIDDEN = "graphopt_hidden"


@transform.module_pass(opt_level=0, name="graphopt.flat")  # type: ignore[untyped-decorator]  # TVM has no types
def flat(module: IRModule, _context: Any) -> IRModule:
    """FlattenBuffer, right for every index."""
    return show(tirx.transform.FlattenBuffer()(hide(module)))


def hide(module: IRModule) -> IRModule:
    """Indices with such quotients as arguments of a call that no pass looks into."""

    def load(access: Any) -> Any:
        return tirx.BufferLoad(access.source, _hidden(access.indices)) if _misread(access.indices) else access

    def store(access: Any) -> Any:
        if not _misread(access.indices):
            return access
        return tirx.BufferStore(access.buffer, access.value, _hidden(access.indices))

    return _mapped(module, lambda body: bool(_others([body])), [(ir.TensorLoad, load), (tirx.BufferStore, store)])


def show(module: IRModule) -> IRModule:
    """What `hide` hid."""
    return _mapped(module, _holds_hidden, [(ir.Call, lambda call: call.args[1] if _is_hidden(call) else call)])


def _mapped(module: IRModule, wanted: Callable[[Any], bool], rules: Sequence[Any]) -> IRModule:
    """With rules applied to the functions whose bodies are wanted; most have nothing to hide."""
    functions = dict(module.functions)
    for place, function in functions.items():
        if isinstance(function, tirx.PrimFunc) and wanted(function.body):
            functions[place] = function.with_body(tvm_ffi.structural_map(function.body, rules, order="post"))
    return IRModule(functions, module.attrs)


def _hidden(indices: Sequence[Any]) -> list[Any]:
    return [tirx.call_pure_extern(i.ty.dtype, _HIDDEN, i) if _others([i]) else i for i in indices]


def _is_hidden(call: Any) -> bool:
    return len(call.args) == 2 and isinstance(call.args[0], ir.StringImm) and call.args[0].value == _HIDDEN


def _holds_hidden(body: Any) -> bool:
    found = False

    def note(call: Any) -> None:
        nonlocal found
        found = found or _is_hidden(call)

    tvm_ffi.structural_walk(body, [(ir.Call, note)])
    return found


def _misread(indices: Sequence[Any]) -> bool:
    """Whether TVM may make another map: not if only one sum has an offset, as when a place in an image is found."""
    others = _others(indices)
    return len(others) > 1 or any(not _is_offset(other) for other in others)


def _others(parts: Sequence[Any]) -> list[Any]:
    """What quotients and remainders are of, each once, that are no sums of positive multiples."""
    found: list[Any] = []

    def note(quotient: Any) -> None:
        if not _is_sum(quotient.a) and not any(tvm_ffi.structural_equal(quotient.a, other) for other in found):
            found.append(quotient.a)

    for part in parts:
        if not isinstance(part, tirx.Var | tirx.IntImm):
            tvm_ffi.structural_walk(part, [(tirx.FloorDiv, note), (tirx.FloorMod, note)])
    return found


def _is_sum(value: Any, *, quotients: bool = True) -> bool:
    match value:
        case tirx.Var():
            return True
        case tirx.Add():
            return _is_sum(value.a, quotients=quotients) and _is_sum(value.b, quotients=quotients)
        case tirx.FloorDiv() | tirx.FloorMod() if not quotients:
            return False
        case tirx.Mul() | tirx.FloorDiv() | tirx.FloorMod():
            return isinstance(value.b, tirx.IntImm) and value.b.value > 0 and _is_sum(value.a, quotients=quotients)
        case _:
            return False


def _is_offset(value: Any) -> bool:
    """A sum of positive multiples of loops, and a positive number."""
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.IntImm):
        return False
    return value.b.value > 0 and _is_sum(value.a, quotients=False)
