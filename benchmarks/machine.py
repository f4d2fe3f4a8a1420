"""What a measurement has to say about where it was taken: as the command line says it, with memory and threads."""

from __future__ import annotations

import os
from typing import Any

import torch

import graphopt
from graphopt.tools import machine as command_line

__all__ = ["machine", "versions"]


def machine() -> dict[str, Any]:
    """Processor, target, cores this process may use, memory, and torch's threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return command_line.machine() | {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, graphopt, torch and the named packages, those that are not installed left out."""
    own = {"graphopt": graphopt.__version__, "torch": torch.__version__}
    return command_line.versions(packages) | own
