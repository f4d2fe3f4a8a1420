"""What a measurement has to say about where it was taken."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import graphopt

__all__ = ["machine", "versions"]


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, and torch's threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, graphopt, torch and the named packages, those that are not installed left out."""
    found = {"python": platform.python_version(), "graphopt": graphopt.__version__, "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
