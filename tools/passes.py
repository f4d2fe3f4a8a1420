"""`graphopt passes`: what passes there are, and the page of one.

The table is read from the sources of the passes, because importing them imports torch, which takes seconds.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.tools.console import data, emit_json, show_table
from graphopt.tools.sources import AsJson

if TYPE_CHECKING:
    from graphopt.transform import Contract, Pass

__all__ = ["Outline", "outline", "passes"]


@dataclass(frozen=True)
class Outline:
    """A pass in one line: the first line of its docstring and how far it may change the numbers."""

    name: str
    contract: str
    what: str


def _complete_name(incomplete: str) -> list[str]:
    from graphopt.registry import PRESETS, pass_names

    return [name for name in (*PRESETS, *pass_names()) if name.startswith(incomplete)]


def passes(
    name: Annotated[
        str | None,
        typer.Argument(help="A pass or a preset.", autocompletion=_complete_name, show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the passes, or show what one does, when, how safely, and with which options."""
    from graphopt.registry import PRESETS, pass_names

    if name is None:
        _show_all([outline(known) for known in pass_names()], PRESETS, as_json=as_json)
    elif name in PRESETS:
        if as_json:
            emit_json({"name": name, "pipeline": PRESETS[name]})
        else:
            data(f"{name} stands for {PRESETS[name]}")
    else:
        _show_one(name, as_json=as_json)


def _show_all(outlines: list[Outline], presets: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        emit_json({"passes": [asdict(row) for row in outlines], "presets": presets})
        return
    show_table(("pass", "contract", "what it does"), [(row.name, row.contract, row.what) for row in outlines])
    show_table(("preset", "stands for"), presets.items())


def _show_one(name: str, *, as_json: bool) -> None:
    from graphopt.registry import get_pass
    from graphopt.transform import format_value

    found = get_pass(name)
    page = inspect.getdoc(found) or ""
    rows = [
        (
            option.name,
            inspect.formatannotation(option.type),
            "required" if option.required else format_value(option.default),
        )
        for option in found.options().values()
    ]
    if as_json:
        options = [{"name": key, "type": kind, "default": default} for key, kind, default in rows]
        emit_json({"name": name, "contract": str(found.contract), "page": page, "options": options})
        return
    data(f"{name} ({found.contract})\n\n{page}")
    if rows:
        data()
        show_table(("option", "type", "default"), rows)
    else:
        data("\nIt takes no options.")


def outline(name: str) -> Outline:
    """The line of a pass, from its source; from the imported class where the source does not say it plainly.

    Raises:
        UsageError: when no pass has that name.
    """
    from graphopt.registry import get_pass, home_of

    found = _class_named(name, home_of(name).partition(":")[0])
    contract = _contract(found) if found else None
    if found is None or contract is None:
        cls: type[Pass] = get_pass(name)
        return Outline(name, str(cls.contract), _first_line(inspect.getdoc(cls)))
    return Outline(name, str(contract), _first_line(ast.get_docstring(found)))


def _class_named(name: str, module: str) -> ast.ClassDef | None:
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            value = _assigned(node, "name")
            if isinstance(value, ast.Constant) and value.value == name:
                return node
    return None


def _assigned(node: ast.ClassDef, name: str) -> ast.expr | None:
    """What the body of a class assigns to `name`."""
    for row in node.body:
        target = (
            row.target if isinstance(row, ast.AnnAssign) else row.targets[0] if isinstance(row, ast.Assign) else None
        )
        if isinstance(row, ast.AnnAssign | ast.Assign) and isinstance(target, ast.Name) and target.id == name:
            return row.value
    return None


def _contract(node: ast.ClassDef) -> Contract | None:
    """`Contract.EXACT`, `Contract.CLOSE(1e-3)` or, where the class derives from Pass alone, the default."""
    from graphopt.transform import Contract, Pass

    value = _assigned(node, "contract")
    if value is None:
        return Pass.contract if [ast.unparse(base) for base in node.bases] == ["Pass"] else None
    call = value.func if isinstance(value, ast.Call) else value
    if not (isinstance(call, ast.Attribute) and ast.unparse(call.value) == "Contract" and hasattr(Contract, call.attr)):
        return None
    member = getattr(Contract, call.attr)
    if not isinstance(value, ast.Call):
        return member if isinstance(member, Contract) else None
    if value.keywords or not all(isinstance(argument, ast.Constant) for argument in value.args):
        return None
    made: Contract = member(*map(ast.literal_eval, value.args))
    return made


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]
