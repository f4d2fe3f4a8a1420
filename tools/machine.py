"""What a measurement has to say about where it was taken. Torch-free."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from graphopt.cpus import processor
from graphopt.target import Target

__all__ = ["machine", "versions"]


def machine() -> dict[str, Any]:
    """The processor by its own name, the system, and what `--target cpu` stands for here."""
    return {
        "processor": processor(),
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
