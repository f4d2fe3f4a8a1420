"""`graphopt targets`: the machines that code can be compiled for."""

from __future__ import annotations

from graphopt.target import Target
from graphopt.tools.console import emit_json, show_table, size_text
from graphopt.tools.sources import AsJson

__all__ = ["targets"]


def targets(as_json: AsJson = False) -> None:
    """List the presets that --target takes, and how each was tested; it also takes the path of a JSON file with the
    fields of one."""
    known = {name: Target.parse(name) for name in Target.names()}
    if as_json:
        more = {name: {"this_machine": name == "cpu", "tested": Target.tested(name)} for name in known}
        emit_json({name: target.to_json() | more[name] for name, target in known.items()})
        return
    numbers = ("cores", "vector bits", "L1", "L2", "L3")
    rows = [
        (
            name,
            target.kind,
            target.arch,
            target.cpu,
            *map(size_text, (target.cores, target.vector_bits, target.l1, target.l2, target.l3)),
            Target.tested(name),
            _remark(name, target, known["cpu"]),
        )
        for name, target in known.items()
    ]
    show_table(("target", "kind", "arch", "cpu", *numbers, "tested", ""), rows, right=numbers)


def _remark(name: str, target: Target, here: Target) -> str:
    if name == "cpu":
        return "this machine"
    return "what this machine is" if (target.arch, target.cpu) == (here.arch, here.cpu) else ""
