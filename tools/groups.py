"""`graphopt groups`: what can be removed from a model together, and what stays and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.files import write_whole
from graphopt.tools.console import counted, data, emit_json, say, show_table, working
from graphopt.tools.sources import AsJson, Source, check_output, read_model

if TYPE_CHECKING:
    from graphopt.analysis.coupling import Coupling, Group, Member

__all__ = ["groups"]


def groups(
    source: Source,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with the graph, in which a group lights up.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the groups of channels, heads and features that can be removed, and what stays and why.

    A group has one family of units, or several where an axis is split: whole heads, or a feature of every head.
    `prune-channels{only=...}` takes the names.
    """
    if html is not None:
        check_output(html, ours=None)
    model = read_model(source)
    with working("following every axis"):
        from graphopt.analysis.coupling import couple

        coupling = couple(model)
        found = coupling.groups
    if html is not None:
        from graphopt.tools._group_page import group_page

        with write_whole(html) as path:
            path.write_text(group_page(source, coupling), encoding="utf-8")
        say(f"wrote {html}")
    if as_json:
        emit_json(
            {"input": source, "groups": [_to_json(group) for group in found.values()], "pinned": _pinned(coupling)}
        )
        return
    rows = [(group.name, _units(group), len(group.members), f"{_parameters(group):,}") for group in found.values()]
    show_table(("group", "units", "tensors", "weights"), rows, right=("tensors", "weights"))
    data(f"{counted(len(found), 'group')}; units are removed as a whole, of one family (separated by |).")
    if coupling.pinned:
        stay = [(row["name"], row["size"], "; ".join(row["reasons"][:3])) for row in _pinned(coupling)]
        show_table(("stays", "positions", "because"), stay, right=("positions",))


def _units(group: Group) -> str:
    return " | ".join(str(len(family)) for family in group.families)


def _parameters(group: Group) -> int:
    """Elements of the tensors that lose something with the group."""
    return sum({member.name: member.slot.tensor.meta["val"].numel() for member in group.members}.values())


def _pinned(coupling: Coupling) -> list[dict[str, Any]]:
    return [{"name": one.name, "size": one.size, "reasons": list(one.reasons)} for one in coupling.pinned]


def _to_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "families": [len(family) for family in group.families],
        "weights": _parameters(group),
        "members": [_member(member) for member in group.members],
    }


def _member(member: Member) -> dict[str, Any]:
    """`positions` is how many of the axis can go, of how many."""
    positions = max(int((unit >= 0).sum()) for unit in member.unit)
    return {
        "tensor": member.name,
        "axis": member.slot.axis,
        "role": member.slot.role,
        "layer": member.slot.user.name,
        "positions": positions,
        "of": int(member.unit[0].size),
    }
