"""`graphopt info`: what a model takes, holds and costs."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.tools.console import data, emit_json, show_table, size_text
from graphopt.tools.sources import AsJson, Source, parse_sizes, read_model

if TYPE_CHECKING:
    from graphopt.analysis.cost import Cost
    from graphopt.model import Model
    from graphopt.signature import Signature

__all__ = ["info"]


class Per(StrEnum):
    """What the rows of the cost table stand for."""

    MODULE = "module"
    NODE = "node"


def info(
    source: Source,
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the graph, one line an operator, and nothing else.")
    ] = False,
    per: Annotated[Per | None, typer.Option(help="Add a table of costs by module or by node.")] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SIZE", help="The number to count with for a free size; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's signature, costs, operators and history."""
    sizes = parse_sizes(at or ())
    model = read_model(source)
    from graphopt.analysis.cost import cost

    costs = cost(model, sizes or None)
    if as_json:
        emit_json(_to_json(source, model, costs, graph=graph, per=per))
    elif graph:
        data(str(model))
    else:
        _show(source, model, costs, per)


def _to_json(source: str, model: Model, costs: Cost, *, graph: bool, per: Per | None) -> dict[str, Any]:
    plain = costs.to_json()
    rows = {name: plain.pop(f"{name}s") for name in Per}
    found = {
        "input": source,
        "mode": model.mode,
        "signature": model.signature.to_json(),
        "cost": plain,
        "history": list(model.history),
    }
    if per is not None:
        found[f"{per}s"] = rows[per]
    if graph:
        found["graph"] = str(model)
    return found


def _show(source: str, model: Model, costs: Cost, per: Per | None) -> None:
    data(f"{source}: {model.mode} mode, {len(model.params)} tensors")
    _show_signature(model.signature)
    show_table(("cost", ""), _totals(costs), right=("",))
    operators = [
        (_short(name), count, "unknown" if name in costs.barriers else "") for name, count in costs.operators.items()
    ]
    show_table(("operator", "calls", ""), operators, right=("calls",))
    if costs.barriers:
        data("Nothing is moved across, pruned through or counted for an unknown operator.")
    data(f"history: {', '.join(model.history) or 'no pass has been applied'}")
    if per is not None:
        _show_rows(costs, per)


def _show_signature(signature: Signature) -> None:
    rows = [("in", spec) for spec in signature.inputs] + [("out", spec) for spec in signature.outputs]
    show_table(("signature", ""), rows)
    for name, range_ in signature.ranges.items():
        data(f"{name} in {range_}")


def _totals(costs: Cost) -> list[tuple[str, str]]:
    return [
        ("multiply-accumulates", size_text(costs.macs)),
        ("other operations", size_text(costs.operations)),
        ("parameters", size_text(costs.parameters)),
        ("bytes of weights", size_text(costs.weight_bytes)),
        ("bytes moved", size_text(costs.moved_bytes)),
        ("peak bytes of activations", size_text(costs.peak_bytes)),
    ]


def _show_rows(costs: Cost, per: Per) -> None:
    numbers: tuple[str, ...]
    if per is Per.MODULE:
        numbers = ("macs", "operations", "parameters", "weight bytes", "bytes moved")
        rows = [
            (
                path or "(whole)",
                m.type.rpartition(".")[2],
                *map(size_text, (m.macs, m.operations, m.parameters, m.weight_bytes, m.moved_bytes)),
            )
            for path, m in costs.modules.items()
        ]
        show_table(("module", "type", *numbers), rows, right=numbers)
        return
    numbers = ("macs", "operations", "bytes moved")
    nodes = [
        (n.name, _short(n.operator), n.module, *map(size_text, (n.macs, n.operations, n.moved_bytes)))
        for n in costs.nodes
    ]
    show_table(("node", "operator", "module", *numbers), nodes, right=numbers)


def _short(operator: str) -> str:
    """`conv2d` for `aten.conv2d.default`, as the printed graph has it."""
    return operator.removeprefix("aten.").removesuffix(".default")
