"""The page of `graphopt groups --html`: the graph from top to bottom, in which a group lights up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from graphopt.printer import module_path, operator_name

if TYPE_CHECKING:
    from torch.fx import Node

    from graphopt.analysis.coupling import Coupling

__all__ = ["group_page"]

_ROW, _LANE, _LEFT = 20, 16, 14


@dataclass(frozen=True)
class _Row:
    """A call: its place in the drawing, and the rows that it uses."""

    text: str
    path: str
    lane: int
    sources: tuple[int, ...]


def group_page(title: str, coupling: Coupling) -> str:
    """A page that needs nothing else: a list of groups, what stays, and the graph."""
    calls = [node for node in coupling.model.graph.nodes if node.op == "call_function"]
    rows = _rows(calls)
    groups = [
        {
            "name": group.name,
            "families": [len(family) for family in group.families],
            "rows": lit,
            "members": [f"{member.name}, axis {member.slot.axis} ({member.slot.role})" for member in group.members],
        }
        for group, lit in zip(coupling.groups.values(), _lit(coupling, calls), strict=True)
    ]
    stays = [{"name": one.name, "size": one.size, "reasons": list(one.reasons)} for one in coupling.pinned]
    data = json.dumps({"groups": groups, "stays": stays}).replace("</", "<\\/")
    return _PAGE.format(title=escape(title), drawing=_drawing(rows), data=data)


def _lit(coupling: Coupling, calls: list[Node]) -> list[list[int]]:
    """For each group the rows that make or read its positions."""
    owner = np.full(coupling.classes.count + 1, -1)
    for number, group in enumerate(coupling.groups.values()):
        owner[[c for family in group.families for unit in family for c in unit]] = number
    found: list[set[int]] = [set() for _ in coupling.groups]
    place = {node: row for row, node in enumerate(calls)}
    for node, row in place.items():
        labels = coupling.trace.labels.get(node)
        for one in labels if isinstance(labels, list) else [labels]:
            for number in np.unique(owner[coupling.of(one).numpy()]) if one is not None else ():
                if number >= 0:
                    found[number].add(row)
    for number, group in enumerate(coupling.groups.values()):
        found[number].update(place[member.slot.user] for member in group.members if member.slot.user in place)
    return [sorted(rows) for rows in found]


def _rows(calls: list[Node]) -> list[_Row]:
    """Every call on a row, in a lane that is free from there to its last user."""
    place = {node: row for row, node in enumerate(calls)}
    last = {node: max((place[user] for user in node.users if user in place), default=place[node]) for node in calls}
    busy: list[int] = []
    lanes: dict[Node, int] = {}
    rows = []
    for node in calls:
        sources = [used for used in dict.fromkeys(node.all_input_nodes) if used in place]
        wanted = [lanes[used] for used in sources if last[used] <= place[node]]
        free = [lane for lane, until in enumerate(busy) if until <= place[node]]
        lane = min(wanted or free, default=len(busy))
        if lane == len(busy):
            busy.append(0)
        busy[lane], lanes[node] = last[node], lane
        rows.append(_Row(operator_name(node.target), module_path(node), lane, tuple(place[used] for used in sources)))
    return rows


def _drawing(rows: list[_Row]) -> str:
    width = _LEFT * 2 + _LANE * max((row.lane for row in rows), default=0)
    parts = [f'<svg width="{width + 640}" height="{_ROW * (len(rows) + 1)}">']
    for number, row in enumerate(rows):
        for source in row.sources:
            parts.append(_edge(rows[source].lane, source, row.lane, number))
    for number, row in enumerate(rows):
        x, y = _at(row.lane, number)
        parts.append(
            f'<g id="r{number}"><circle cx="{x}" cy="{y}" r="4"/><text x="{width}" y="{y + 4}">{escape(row.text)}'
            f'<tspan class="path" dx="8">{escape(row.path)}</tspan></text></g>'
        )
    return "\n".join([*parts, "</svg>"])


def _at(lane: int, row: int) -> tuple[int, int]:
    return _LEFT + _LANE * lane, _ROW * (row + 1) - _ROW // 2


def _edge(lane: int, row: int, to_lane: int, to_row: int) -> str:
    """Down the lane of the source, then over to that of the user."""
    (x, y), (u, v) = _at(lane, row), _at(to_lane, to_row)
    turn = v - _ROW
    return f'<path d="M{x} {y} L{x} {max(y, turn)} C{x} {v} {u} {turn} {u} {v}"/>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}: groups</title><style>
body {{ margin: 0; display: flex; height: 100vh; font: 13px/1.4 system-ui, sans-serif; color: #222; background: #fff }}
nav {{ width: 26em; overflow: auto; padding: 1em; border-right: 1px solid #ddd; box-sizing: border-box; flex: none }}
main {{ overflow: auto; padding: 1em; flex: 1 }}
h1 {{ font-size: 1.2em; margin: 0 0 .6em }} h2 {{ font-size: 1em; margin: 1.2em 0 .4em }}
button {{ display: flex; justify-content: space-between; gap: 1em; width: 100%; border: 0; background: none;
  font: inherit; padding: .25em .5em; text-align: left; cursor: pointer; border-radius: 3px; overflow-wrap: anywhere }}
button:hover, button:focus {{ background: #f0f0f0 }} button[aria-pressed=true] {{ background: #ffe3c2 }}
ul {{ margin: .3em 0; padding-left: 1.6em; color: #666 }} p {{ color: #666 }}
svg path {{ fill: none; stroke: #bbb }} svg circle {{ fill: #888 }} svg text {{ font: 12px ui-monospace, monospace }}
svg .path {{ fill: #999 }} svg.choosing g {{ opacity: .35 }} svg.choosing g.lit {{ opacity: 1 }}
g.lit circle {{ fill: #d95f02; r: 6px }} g.lit text {{ font-weight: 600 }}
</style></head><body>
<nav><h1>{title}</h1><p>Choose a group to see which operators make and read its positions.</p>
<h2>Groups</h2><div id="groups"></div><h2>What stays</h2><div id="stays"></div></nav>
<main>{drawing}</main>
<script>
const data = {data};
const svg = document.querySelector("svg"), list = document.getElementById("groups");
function text(tag, content, parent) {{
  const made = document.createElement(tag); made.textContent = content; parent.append(made); return made;
}}
function choose(group, button) {{
  const again = button.getAttribute("aria-pressed") === "true";
  document.querySelectorAll("button").forEach(b => b.setAttribute("aria-pressed", "false"));
  document.querySelectorAll("g.lit").forEach(g => g.classList.remove("lit"));
  document.querySelectorAll("nav ul.members").forEach(u => u.remove());
  svg.classList.toggle("choosing", !again);
  if (again) return;
  button.setAttribute("aria-pressed", "true");
  group.rows.forEach(row => document.getElementById("r" + row).classList.add("lit"));
  const members = document.createElement("ul"); members.className = "members";
  group.members.forEach(member => text("li", member, members));
  button.after(members);
  document.getElementById("r" + group.rows[0]).scrollIntoView({{block: "center"}});
}}
data.groups.forEach(group => {{
  const button = document.createElement("button"); button.setAttribute("aria-pressed", "false");
  text("span", group.name, button); text("span", group.families.join(" | "), button);
  button.onclick = () => choose(group, button); list.append(button);
}});
data.stays.forEach(one => {{
  const item = text("p", one.name + " (" + one.size + ")", document.getElementById("stays"));
  const reasons = document.createElement("ul"); item.after(reasons);
  one.reasons.slice(0, 3).forEach(reason => text("li", reason, reasons));
}});
if (location.hash) list.querySelectorAll("button")[Number(location.hash.slice(1))]?.click();
</script></body></html>
"""
