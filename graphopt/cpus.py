"""Processors and instruction-set extensions that code can be compiled for, by name.

The names of processors are LLVM's; the extensions are spelled as Linux spells them in /proc/cpuinfo, and LLVM's
spelling of each is known too. `cpus.json` holds both, with the extensions that every processor has, so that no compiler
is needed to check a name; a test compares it with the compiler. Extensions that no compiled model uses (such as those
for encryption) are not listed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.names import nearest

__all__ = ["canonical", "features_of", "known_features", "llvm_names", "processor", "unknown"]


def features_of(arch: str, cpu: str) -> frozenset[str]:
    """The extensions of a processor; none for an unknown one."""
    return frozenset(_table(arch)["cpus"].get(cpu, "").split())


def known_features(arch: str) -> frozenset[str]:
    """All extensions of an architecture that can be named."""
    return frozenset(_table(arch)["features"])


def canonical(arch: str, features: Iterable[str]) -> tuple[str, ...]:
    """Extensions as Linux spells them, sorted; those in LLVM's spelling are translated, unknown ones stay."""
    spellings = _table(arch)["features"]
    found: set[str] = set()
    for feature in features:
        same = [name for name, llvm in spellings.items() if llvm == feature]
        found.update([feature] if feature in spellings or not same else same)
    return tuple(sorted(found))


def llvm_names(arch: str, features: Iterable[str]) -> list[str]:
    """Extensions as LLVM spells them."""
    spellings = _table(arch)["features"]
    return sorted({spellings[feature] for feature in features})


def unknown(arch: str, cpu: str, features: Iterable[str]) -> list[str]:
    """What is wrong with these names, each with the nearest known ones; nothing is for another kind of machine."""
    table = _table(arch)
    if not table["cpus"]:
        return []
    problems = [] if cpu in table["cpus"] else [f"unknown CPU '{cpu}' of {arch}: {nearest(cpu, table['cpus'])}"]
    known = {*table["features"], *table["features"].values()}
    problems += [
        f"unknown feature '{feature}' of {arch}: {nearest(feature, known)}"
        for feature in features
        if feature not in known
    ]
    return problems


def processor(path: str = "/proc/cpuinfo") -> str:
    """The name that the processor of this machine gives itself."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _table(arch: str) -> dict[str, Any]:
    return _tables().get(arch, {"features": {}, "cpus": {}})


@cache
def _tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "cpus.json").read_text(encoding="utf-8"))
    return tables
