"""10,000 operators against the same with an edit in each of 500 blocks."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import graphopt as go
from benchmarks.long_graph import long_graph
from benchmarks.machine import memory
from graphopt.model import Model
from graphopt.printer import module_path
from graphopt.rewriter import Node, Rewriter

__all__ = ["edited", "measure"]

aten = torch.ops.aten
OPERATORS, EDITS = 10_000, 500


def edited(model: Model, count: int) -> tuple[Model, list[tuple[str, str]]]:
    """A copy with `count` edits, one a block, and for each the kind of entry and the node or operator it is about."""
    copy = model.clone(share_tensors=True)
    rw = Rewriter(copy)
    blocks: defaultdict[str, dict[Any, Node]] = defaultdict(dict)
    for node in rw.find():
        blocks[module_path(node).partition(".")[0]].setdefault(node.target, node)
    kinds = ("inserted", "removed", "attribute", "weight")
    done = [_edit(rw, block, kinds[number % len(kinds)]) for number, block in enumerate(list(blocks.values())[:count])]
    return copy, sorted(done)


def _edit(rw: Rewriter, block: dict[Any, Node], kind: str) -> tuple[str, str]:
    norm = block[aten.batch_norm.default]
    if kind == "inserted":
        (user,) = norm.users
        made = rw.call(aten.neg.default, norm, before=user)
        rw.replace_input(user, norm, made, "inserted")
        return ("inserted", "neg")
    if kind == "removed":
        node = next(user for user in norm.users)
        name = node.name
        rw.replace(node, norm, "removed")
        return ("removed", name)
    if kind == "attribute":
        rw.update(norm, "changed", eps=0.5)
        return ("changed", norm.name)
    linear = block[aten.linear.default]
    weight = next(node for node in linear.all_input_nodes if node.op == "get_attr")
    rw.set_tensor(
        weight, rw.params[str(weight.target)].detach() + 0.1 * torch.rand(weight.meta["val"].shape), "changed"
    )
    return ("changed", linear.name)


def measure() -> dict[str, Any]:
    """Seconds, memory and what was found."""
    torch.set_num_threads(1)
    model = long_graph(OPERATORS)
    other, done = edited(model, EDITS)
    go.diff(model, other, cost=False)  # what is imported at the first call is not the diff
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is now this
    start, cpu = time.perf_counter(), time.process_time()
    found = go.diff(model, other)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    growth = memory("VmHWM") - before
    start = time.perf_counter()
    go.diff(model, other, cost=False)
    without_cost = time.perf_counter() - start
    names = sorted(
        (entry.kind, found.b.view.items[entry.inserted[0]].operator)
        if entry.kind == "inserted"
        else (entry.kind, found.a.view.items[entry.a[0]].name)
        for entry in found.entries
    )
    return {
        "operators": sum(1 for _ in found.a.view.calls()),
        "edits": len(done),
        "entries": len(found.entries),
        "entries_as_edited": names == done,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "seconds_without_cost": round(without_cost, 2),
        "growth_mb": round(growth / 1e6, 1),
        "peak_mb": round((before + growth) / 1e6, 1),
    }
