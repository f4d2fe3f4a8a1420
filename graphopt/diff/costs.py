"""The costs of two models side by side: totals, operators, modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from graphopt.analysis.cost import Cost, cost
from graphopt.model import Model
from graphopt.ops import Size

__all__ = ["CostDiff", "compare_costs"]

Sides: TypeAlias = "tuple[Size | None, Size | None]"
"""A number before and after; None for what is not there. With free sizes it is an expression."""

_MODULE = ("macs", "parameters", "weight_bytes", "moved_bytes")


@dataclass(frozen=True, slots=True)
class CostDiff:
    """Numbers before and after.

    Attributes:
        totals: by name: `nodes`, `macs`, `operations`, `parameters`, `weight_bytes`, `moved_bytes`, `peak_bytes`.
        operators: how many nodes of each operator.
        modules: for each module, `macs`, `parameters`, `weight_bytes` and `moved_bytes`, those alike on both sides
            included; None where a side has no such module.
    """

    totals: Mapping[str, Sides]
    operators: Mapping[str, tuple[int, int]]
    modules: Mapping[str, Mapping[str, Sides]]

    def changed_modules(self) -> dict[str, Mapping[str, Sides]]:
        """The modules in which some number differs."""
        return {path: row for path, row in self.modules.items() if any(x != y for x, y in row.values())}

    def to_json(self) -> dict[str, Any]:
        return {
            "totals": _plain(self.totals),
            "operators": {name: list(sides) for name, sides in self.operators.items()},
            "modules": {path: _plain(row) for path, row in self.changed_modules().items()},
        }


def compare_costs(a: Model, b: Model) -> CostDiff:
    """Count both models."""
    x, y = cost(a), cost(b)
    names = dict.fromkeys((*x.operators, *y.operators))
    paths = dict.fromkeys((*x.modules, *y.modules))
    return CostDiff(
        totals=_totals(x, y),
        operators={name: (x.operators.get(name, 0), y.operators.get(name, 0)) for name in names},
        modules={path: {name: (_of(x, path, name), _of(y, path, name)) for name in _MODULE} for path in paths},
    )


def _totals(x: Cost, y: Cost) -> dict[str, Sides]:
    rows: dict[str, Sides] = {"nodes": (len(x.nodes), len(y.nodes))}
    for name in ("macs", "operations", "parameters", "weight_bytes", "moved_bytes", "peak_bytes"):
        rows[name] = (getattr(x, name), getattr(y, name))
    return rows


def _of(found: Cost, path: str, name: str) -> Size | None:
    module = found.modules.get(path)
    size: Size | None = None if module is None else getattr(module, name)
    return size


def _plain(rows: Mapping[str, Sides]) -> dict[str, list[int | str | None]]:
    return {
        name: [size if size is None or isinstance(size, int) else str(size) for size in sides]
        for name, sides in rows.items()
    }
