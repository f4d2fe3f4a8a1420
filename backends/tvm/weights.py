"""The weights of a compiled model: arguments of its code, which are checked once and not in every call."""

from __future__ import annotations

from typing import Any

from tvm import IRModule, ir, relax

from graphopt.backends.tvm.runtime import CHECK_WEIGHTS

__all__ = ["check_apart", "take_weights_out"]

_SMALLEST_WEIGHT = 64
"""Constants of fewer elements stay in the code; the others become arguments, so that they can be mapped from a file."""

_CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
"""What the virtual machine's code begins with, for every parameter: its dtype and rank, and its sizes."""


def take_weights_out(module: IRModule) -> tuple[IRModule, list[Any]]:
    """Turn the large constants of `main` into parameters after its inputs; returns their values in order."""
    lifter = _ConstantLifter(module)
    main = lifter.visit_expr(module["main"])
    lifted = relax.Function([*main.params, *lifter.parameters], main.body, main.ret_ty, main.is_pure, main.attrs)
    module = IRModule({**module.functions, module.get_global_var("main"): lifted}, module.attrs)
    return module, [constant.value for constant in lifter.constants]


@relax.expr_functor.mutator
class _ConstantLifter(relax.PyExprMutator):
    def __init__(self, module: IRModule) -> None:
        super().__init__(module)
        self.constants: list[Any] = []
        self.parameters: list[Any] = []

    def visit_generic_const_(self, constant: Any) -> Any:
        size = 1
        for dim in constant.value.shape:
            size *= dim
        if size < _SMALLEST_WEIGHT:
            return constant
        for known, parameter in zip(self.constants, self.parameters, strict=True):
            if known.value.same_as(constant.value):
                return parameter
        self.constants.append(constant)
        self.parameters.append(relax.Var(f"weight_{len(self.parameters)}", constant.ty))
        return self.parameters[-1]


def check_apart(module: IRModule, count: int) -> IRModule:
    """Move the checks of the last `count` parameters of `main` into a function of its own (`runtime.CHECK_WEIGHTS`).

    A net has a hundred weights, and two checks of each are most of what the virtual machine does in a call.
    """
    main = module["main"]
    weights = list(main.params)[len(main.params) - count :]
    kept: list[Any] = []
    taken: list[Any] = []
    for block in main.body.blocks:
        checks = [binding for binding in block.bindings if _checks(binding, weights)]
        taken += checks
        kept.append(relax.BindingBlock([binding for binding in block.bindings if binding not in checks]))
    if len(taken) != len(_CHECKS) * count:
        raise AssertionError(f"{count} weights have {len(taken)} checks")
    body = relax.SeqExpr(kept, main.body.body)
    checked = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    heaps = [call.args[1] for call in (binding.value for binding in taken) if len(call.args) > 1]
    heap = [b for block in kept for b in block.bindings if any(b.var.same_as(argument) for argument in heaps)]
    nothing = relax.SeqExpr([relax.BindingBlock([*heap, *taken])], relax.Tuple([]))
    checker = relax.Function(weights, nothing, relax.TupleType([]), False)
    checker = relax.utils.copy_with_new_vars(checker).with_attr("global_symbol", CHECK_WEIGHTS)
    functions = {**module.functions, module.get_global_var("main"): checked, ir.GlobalVar(CHECK_WEIGHTS): checker}
    return IRModule(functions, module.attrs)


def _checks(binding: Any, weights: list[Any]) -> bool:
    call = binding.value
    return (
        isinstance(call, ir.Call)
        and isinstance(call.op, relax.ExternFunc)
        and str(call.op.global_symbol) in _CHECKS
        and any(call.args[0].same_as(weight) for weight in weights)
    )
