"""Symbolic sizes: from torch's sympy expressions to TIR."""

from __future__ import annotations

import functools
import operator
from collections.abc import ItemsView
from typing import Any

import sympy
import torch
from tvm import tirx

from graphopt.backends.tvm.registry import Refused

__all__ = ["Symbols"]


class Symbols:
    """One TIR variable (int64) per torch symbol, and the expressions built from them."""

    def __init__(self) -> None:
        self._variables: dict[str, Any] = {}

    def items(self) -> ItemsView[str, Any]:
        return self._variables.items()

    def variables(self) -> list[Any]:
        return list(self._variables.values())

    def size(self, value: Any) -> Any:
        """An integer as it is; a SymInt as a TIR expression.

        Raises:
            Refused: for a symbolic float or boolean, or an expression of an unknown kind.
        """
        if isinstance(value, torch.SymInt):
            return self._tir(value.node.expr)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise Refused(f"a number computed from sizes: {value}")
        return value

    def _tir(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            return self._variables.setdefault(expr.name, tirx.Var(expr.name, "int64"))
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
            return functools.reduce(operator.mul, [self._tir(expr.base)] * int(expr.exp))
        function = _FUNCTIONS.get(type(expr).__name__)
        if function is None:
            raise Refused(f"a size of unknown form: {expr}")
        return functools.reduce(function, [self._tir(argument) for argument in expr.args])


_FUNCTIONS = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": tirx.floordiv,
    "CleanDiv": tirx.floordiv,
    "Mod": tirx.floormod,
    "PythonMod": tirx.floormod,
    "Max": tirx.max,
    "Min": tirx.min,
}
