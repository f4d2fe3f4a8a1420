"""What code is compiled for, as plain data: instruction set, cores, vector width, caches."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from graphopt import cpus
from graphopt.errors import UsageError
from graphopt.names import nearest

__all__ = ["Kind", "Target", "this_machine", "why_not_here"]

Kind = Literal["cpu", "arm64", "armv7", "riscv64", "cuda"]

_LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
"""Levels of the x86-64 psABI, the richest first."""

_ARCHS = {"cpu": "x86_64", "arm64": "aarch64", "armv7": "armv7", "riscv64": "riscv64"}

_MACHINES = {"aarch64": "arm64", "arm64": "arm64", "armv7l": "armv7", "armv8l": "armv7", "riscv64": "riscv64"}
"""The plainest preset of a machine, by the name that its system gives it; x86-64 for all others."""

_VECTOR_FLAGS = (("avx512f", 512), ("avx2", 256), ("avx", 256))


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        kind: `cpu` (x86-64), `arm64`, `armv7` (32 bits, with NEON), `riscv64` (without vectors) or `cuda`.
        arch: `x86_64`, `aarch64`, `armv7`, `riscv64`, or the GPU's architecture such as `sm_90`.
        cpu: the processor as LLVM names it; empty for a GPU.
        features: instruction-set extensions worth knowing, sorted, spelled as the kernel spells them. Code may use them
            and those that the processor has in any case (`needs`).
        cores: threads to use unless the caller says otherwise.
        vector_bits: width of a vector register.
        l1, l2, l3: bytes of cache, the first two per core; 0 when there is none or it is unknown.
    """

    kind: Kind
    arch: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    vector_bits: int
    l1: int
    l2: int
    l3: int

    def __post_init__(self) -> None:
        problems = _misnamed(self.kind, self.arch, self.cpu, self.features)
        if problems:
            raise UsageError(f"not a target: {'; '.join(problems)}", todo=_WHERE_FIELDS_ARE)

    @property
    def needs(self) -> frozenset[str]:
        """Every extension that the code for this target may use."""
        return cpus.features_of(self.arch, self.cpu) | frozenset(self.features)

    @classmethod
    def parse(cls, text: str) -> Target:
        """A target from a preset's name, JSON text, or the path of a JSON file. `cpu` is the machine this runs on.

        Raises:
            UsageError: for an unknown name, an unreadable file, or fields that are missing, unknown or of a wrong type.
        """
        if text == "cpu":
            return this_machine()
        if text.lstrip().startswith("{"):
            return cls.from_json(_parsed(text, "the target"))
        presets = _presets()
        if text in presets:
            return cls.from_json(presets[text]["target"])
        if text.endswith(".json"):
            try:
                content = Path(text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the target file '{text}' cannot be read", why=str(error)) from error
            return cls.from_json(_parsed(content, f"the target file '{text}'"))
        raise UsageError(f"there is no target '{text}'", todo=_advice(text))

    @staticmethod
    def names() -> list[str]:
        """Every name that `parse` knows."""
        return ["cpu", *_presets()]

    @staticmethod
    def tested(name: str) -> str:
        """How code for a preset was tested."""
        return "the tests and benchmarks run it" if name == "cpu" else str(_presets()[name]["tested"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"features": list(self.features)}

    @classmethod
    def from_json(cls, data: Any) -> Target:
        """Inverse of `to_json`.

        Raises:
            UsageError: naming every field that is missing, unknown or of a wrong type, and a processor and features
                that do not exist, with the nearest that do.
        """
        if not isinstance(data, Mapping):  # JSON text may hold anything
            raise UsageError("a target is an object of fields", todo=f"the fields are {', '.join(_FIELDS)}")
        problems = [f"unknown field '{name}'" for name in data if name not in _FIELDS]
        problems += [f"missing field '{name}'" for name in _FIELDS if name not in data]
        problems += [
            f"wrong '{name}': {data[name]!r}" for name in _FIELDS if name in data and not _fits(name, data[name])
        ]
        names = ("kind", "arch", "cpu", "features")
        if all(name in data and _fits(name, data[name]) for name in names):
            problems += _misnamed(*(data[name] for name in names))
        if problems:
            raise UsageError(f"not a target: {'; '.join(problems)}", todo=_WHERE_FIELDS_ARE)
        return cls(**{**data, "features": cpus.canonical(data["arch"], data["features"])})


_FIELDS = tuple(field.name for field in fields(Target))
_WHERE_FIELDS_ARE = f"the fields are {', '.join(_FIELDS)}; `graphopt targets --json` shows those of every preset"


def _misnamed(kind: str, arch: str, cpu: str, features: Iterable[str]) -> list[str]:
    """What is wrong with the names in a target."""
    right = _ARCHS.get(kind)
    if right is not None and arch != right:
        return [f"wrong 'arch' of kind {kind}: '{arch}', it is {right}"]
    return cpus.unknown(arch, cpu, features)


def _fits(name: str, value: Any) -> bool:
    if name == "kind":
        return value in get_args(Kind)
    if name == "features":
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if name in ("arch", "cpu"):
        return isinstance(value, str)
    return type(value) is int and value >= (1 if name == "cores" else 0)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{what} is not JSON", why=str(error)) from error


def _advice(text: str) -> str:
    """What to do about a name that is no preset."""
    archs = [arch for arch in _ARCHS.values() if not cpus.unknown(arch, text, ())]
    if archs:
        own = f"write a JSON file with it as 'cpu'; {_WHERE_FIELDS_ARE}"
        presets = [name for name, fields in _presets().items() if fields["target"]["arch"] == archs[0]]
        return f"it is a CPU of {archs[0]}. {nearest(text, presets).capitalize()} Or {own}"
    return nearest(text, ["cpu", *_presets()])


@cache
def _presets() -> dict[str, Any]:
    presets: dict[str, Any] = json.loads((Path(__file__).parent / "targets.json").read_text(encoding="utf-8"))
    return presets


@cache
def this_machine() -> Target:
    """The CPU this process runs on; what the system does not tell is taken from the plainest preset of its kind."""
    plain = Target.parse(_MACHINES.get(platform.machine().lower(), "x86-64"))
    flags = _cpu_flags()
    richest = (level for level in _LEVELS if flags >= cpus.features_of(plain.arch, level))
    caches = _cache_sizes()
    return Target(
        kind=plain.kind,
        arch=plain.arch,
        cpu=next(richest, plain.cpu) if plain.kind == "cpu" else plain.cpu,
        features=tuple(sorted(flags & cpus.known_features(plain.arch))) or plain.features,
        cores=_usable_cores(),
        vector_bits=next((bits for flag, bits in _VECTOR_FLAGS if flag in flags), plain.vector_bits),
        l1=caches.get(1, plain.l1),
        l2=caches.get(2, plain.l2),
        l3=caches.get(3, plain.l3),
    )


def why_not_here(target: Target) -> str | None:
    """Why code for a target does not run on this machine; None when it does."""
    here = this_machine()
    name = f"this machine is {here.arch} {here.cpu} ({cpus.processor()})"
    if target.arch != here.arch:
        return name
    missing = sorted(target.needs - here.needs)
    return f"it may use {', '.join(missing)}; {name}, which has none of these" if missing else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """Flags of the first processor; empty where the file does not exist."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _cache_sizes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[int, int]:
    """Bytes of the data (or unified) cache of every level that the system reports."""
    sizes: dict[int, int] = {}
    for folder in sorted(Path(root).glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        number = size.rstrip("KMG")
        if kind != "Instruction" and level.isdigit() and number.isdigit():
            sizes[int(level)] = int(number) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
    return sizes
