"""What a measurement has to say about where it was taken. Torch-free."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from graphopt.target import Target

__all__ = ["machine", "versions"]


def machine() -> dict[str, Any]:
    """The processor by its own name, the system, and what `--target cpu` stands for here."""
    return {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "target": Target.parse("cpu").to_json(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor(path: str = "/proc/cpuinfo") -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
