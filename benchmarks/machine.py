"""What a measurement has to say about where it was taken: as the command line says it, with memory and threads."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.tools import machine as command_line

__all__ = ["commit", "machine", "memory", "versions"]


def machine() -> dict[str, Any]:
    """Processor, target, cores this process may use, memory, and torch's threads."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return command_line.machine() | {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(installed / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, graphopt, torch and the named packages, those that are not installed left out."""
    own = {"graphopt": graphopt.__version__, "torch": torch.__version__}
    return command_line.versions(packages) | own


def commit() -> str:
    """The commit of this checkout, `-dirty` where files differ from it; empty outside one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def memory(field: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
