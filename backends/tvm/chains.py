"""Two functions of which the second alone reads what the first computes, made one where a kernel does both.

What is between them then stays in the cache of the core that computes it, instead of going through memory.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, relax, s_tir, tirx

from graphopt.backends.tvm.kernels.expanded import CHAIN, expanded_kernel
from graphopt.backends.tvm.kernels.fused import read_fused
from graphopt.backends.tvm.kernels.machine import Machine

__all__ = ["chained", "in_one"]


def chained(module: IRModule, machine: Machine) -> IRModule:
    """The module with calls merged. The functions that are left without a call stay in it."""
    return _Chaining(module, machine).run()


@relax.expr_functor.mutator
class _Chaining(relax.PyExprMutator):
    def __init__(self, module: IRModule, machine: Machine) -> None:
        super().__init__(module)
        self.machine = machine
        self.main = module["main"]
        self.uses = Counter[Any]()
        self.calls: dict[Any, Any] = {}
        for block in self.main.body.blocks:
            for binding in block.bindings:
                self.uses.update(_variables(binding.value))
                if _is_call(binding.value):
                    self.calls[binding.var] = binding.value
        self.uses.update(_variables(self.main.body.body))
        self.known: dict[tuple[str, str], Any] = {}

    def run(self) -> IRModule:
        place = self.builder_.get().get_global_var("main")
        self.builder_.update_func(place, self.visit_expr(self.main))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if not _is_call(call):
            return call
        data, *others = call.args[1].fields
        first = self.lookup_binding(data) if isinstance(data, relax.Var) else None
        if first is None or not _is_call(first) or self.uses[data] != 1:
            return call
        place = self._merged(first.args[0], call.args[0])
        if place is None:
            return call
        return relax.call_tir(place, [*first.args[1].fields, *others], call.ty_args[0])

    def _merged(self, first: Any, second: Any) -> Any | None:
        """The function that does what both do, added to the module at first; None when no kernel does."""
        key = first.name_hint, second.name_hint
        if key not in self.known:
            module = self.builder_.get()
            functions = module[first], module[second]
            self.known[key] = None
            if tuple(map(_kind, functions)) == CHAIN:
                both = in_one(*functions)
                if expanded_kernel(both, self.machine) is not None:
                    self.known[key] = self.builder_.add_func(both, f"{key[0]}_{key[1].removeprefix('fused_')}")
        return self.known[key]


def _kind(function: Any) -> str | None:
    """What the anchor of a function computes."""
    fused = read_fused(function) if isinstance(function, tirx.PrimFunc) else None
    return None if fused is None else str(fused.notes["kernel"])


def _variables(expression: Any) -> list[Any]:
    found: list[Any] = []
    relax.analysis.post_order_visit(expression, lambda e: found.append(e) if isinstance(e, relax.Var) else None)
    return found


def _is_call(value: Any) -> bool:
    return isinstance(value, ir.Call) and value.op.same_as(ir.Op.get("relax.call_tir")) and len(value.args) == 2


def in_one(first: tirx.PrimFunc, second: tirx.PrimFunc) -> tirx.PrimFunc:
    """The blocks of both functions; the result of the first, which the second takes first, is a buffer of their own."""
    between, data = first.params[-1], second.params[0]

    def instead(variable: Any) -> Any:
        return between if variable.same_as(data) else variable

    body = tvm_ffi.structural_map(second.body, (tirx.Var, instead), order="post")
    before, after = first.body.block, body.block
    buffers = [*before.alloc_buffers, between, *after.alloc_buffers]
    root = s_tir.SBlock([], [], [], "root", tirx.SeqStmt([before.body, after.body]), alloc_buffers=buffers)
    params = [*first.params[:-1], *second.params[1:]]
    whole = tirx.PrimFunc(params, s_tir.SBlockRealize([], True, root)).with_attrs(dict(first.attrs.items()))
    return s_tir.renew_defs(whole)
