"""What code is compiled for, as plain data: instruction set, cores, vector width, caches."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from graphopt.errors import UsageError
from graphopt.names import nearest

__all__ = ["Kind", "Target"]

Kind = Literal["cpu", "arm64", "cuda"]

_LEVELS = (
    ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    ("x86-64-v3", ("avx2", "fma", "bmi1", "bmi2", "f16c")),
    ("x86-64-v2", ("sse4_2", "popcnt", "ssse3")),
)
"""Levels of the x86-64 psABI with the flags, as the kernel spells them, that tell each from the one below."""

_VECTOR_FLAGS = (("avx512f", 512), ("avx2", 256), ("avx", 256))


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        kind: `cpu` (x86-64), `arm64` or `cuda`.
        arch: `x86_64`, `aarch64`, or the GPU's architecture such as `sm_90`.
        cpu: the processor as LLVM names it; empty for a GPU.
        features: instruction-set extensions worth knowing, sorted, spelled as the kernel spells them.
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
            return cls.from_json(presets[text])
        if text.endswith(".json"):
            try:
                content = Path(text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the target file '{text}' cannot be read", why=str(error)) from error
            return cls.from_json(_parsed(content, f"the target file '{text}'"))
        raise UsageError(f"there is no target '{text}'", todo=nearest(text, ["cpu", *presets]))

    @staticmethod
    def names() -> list[str]:
        """Every name that `parse` knows."""
        return ["cpu", *_presets()]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"features": list(self.features)}

    @classmethod
    def from_json(cls, data: Any) -> Target:
        """Inverse of `to_json`.

        Raises:
            UsageError: naming every field that is missing, unknown or of a wrong type.
        """
        if not isinstance(data, Mapping):  # JSON text may hold anything
            raise UsageError("a target is an object of fields", todo=f"the fields are {', '.join(_FIELDS)}")
        problems = [f"unknown field '{name}'" for name in data if name not in _FIELDS]
        problems += [f"missing field '{name}'" for name in _FIELDS if name not in data]
        problems += [
            f"wrong '{name}': {data[name]!r}" for name in _FIELDS if name in data and not _fits(name, data[name])
        ]
        if problems:
            raise UsageError(f"not a target: {'; '.join(problems)}", todo=f"the fields are {', '.join(_FIELDS)}")
        return cls(**{**data, "features": tuple(data["features"])})


_FIELDS = tuple(field.name for field in fields(Target))


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


@cache
def _presets() -> dict[str, Any]:
    presets: dict[str, Any] = json.loads((Path(__file__).parent / "targets.json").read_text(encoding="utf-8"))
    return presets


@cache
def this_machine() -> Target:
    """The CPU this process runs on; what the system does not tell is taken from the plainest preset of its kind."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    plain = Target.from_json(_presets()["arm64" if arm else "x86-64"])
    flags = _cpu_flags()
    caches = _cache_sizes()
    return Target(
        kind=plain.kind,
        arch=plain.arch,
        cpu=plain.cpu if arm else next((level for level, needs in _LEVELS if flags.issuperset(needs)), plain.cpu),
        features=tuple(sorted(flags & _KNOWN_FEATURES)) or plain.features,
        cores=_usable_cores(),
        vector_bits=plain.vector_bits if arm else next((b for flag, b in _VECTOR_FLAGS if flag in flags), 128),
        l1=caches.get(1, plain.l1),
        l2=caches.get(2, plain.l2),
        l3=caches.get(3, plain.l3),
    )


_KNOWN_FEATURES = {
    *("sse2", "sse4_2", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2"),
}


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
