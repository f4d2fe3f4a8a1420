"""Two `.gopt` files of 2.5 GB: compared, weights included, against reading both files once and doing nothing else.

Each measurement is a process of its own, so that no mapping of one is left for the next, and is taken with the files
in the system's cache and with the cache emptied of them before. Three pairs of files: equal ones, ones in which a
tenth of the weights differ, and ones in which all do.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt as go
from benchmarks.machine import memory

__all__ = ["measure"]

WIDTH, LAYERS = 4096, 38
ROUNDS = 2
_PIECE = 1 << 24

CODE = """
import json, sys
from benchmarks.diff_large import {function}
print(json.dumps({function}(sys.argv[1], sys.argv[2])))
"""


def write(path: str, _: str) -> dict[str, Any]:
    """A net of square layers with cheap random weights, as a folder: a zip file would be made in memory."""
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).eval()
    net = net.to_empty(device="cpu")
    template = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, weight in enumerate(net.parameters()):
            weight.copy_(template).mul_(1 + number / 7)
        model = go.capture(net, (torch.zeros(1, WIDTH),))
    Path(path).mkdir()
    model.save(path)
    return {}


def change(folder: Path, part: float) -> None:
    """Change the last part of the weights in their file."""
    (file,) = folder.glob("*weights*")
    layer = WIDTH * WIDTH * 4
    with file.open("r+b") as stream:
        for number in range(round(LAYERS * (1 - part)), LAYERS):
            stream.seek(-layer * (LAYERS - number), os.SEEK_END)
            numbers = np.frombuffer(stream.read(layer), np.float32) + np.float32(0.01)
            numbers[::2] *= np.float32(1.5)
            stream.seek(-layer * (LAYERS - number), os.SEEK_END)
            stream.write(numbers.tobytes())


def read(first: str, second: str) -> dict[str, Any]:
    """Read every byte of both files once."""
    buffer = bytearray(_PIECE)
    start, size = time.perf_counter(), 0
    for folder in (first, second):
        for path in sorted(Path(folder).iterdir()):
            with path.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    size += count
    return {"seconds": time.perf_counter() - start, "bytes": size}


def compare(first: str, second: str) -> dict[str, Any]:
    """Diff both, loading and costs included; what Python takes to import comes before."""
    import graphopt.analysis.cost
    import graphopt.archive
    import graphopt.diff  # noqa: F401 - what is imported now is not measured

    go.diff(*[go.capture(nn.Linear(2, 2), (torch.zeros(1, 2),))] * 2)
    start, cpu = time.perf_counter(), time.process_time()
    found = go.diff(first, second)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "entries": len(found.entries),
        "relations": found.relations(),
        "anonymous_mb": round(_anonymous() / 1e6, 1),
        "peak_mb": round(memory("VmHWM") / 1e6, 1),
    }


def _anonymous() -> int:
    """Memory that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def forget(*folders: Path) -> None:
    """Drop the files from the system's cache."""
    for folder in folders:
        for path in folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def apart(function: str, first: Path, second: Path) -> dict[str, Any]:
    """Run a function in a process of its own."""
    command = [sys.executable, "-c", CODE.format(function=function), str(first), str(second)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> dict[str, Any]:
    """Seconds of both, warm and cold, for the three pairs."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-", dir=os.environ.get("GRAPHOPT_BENCH_DIR")) as folder:
        first, second = Path(folder) / "a.gopt", Path(folder) / "b.gopt"
        apart("write", first, second)
        shutil.copytree(first, second)
        for label, changed in (("equal", 0.0), ("a tenth differs", 0.1), ("all differ", 1.0)):
            change(second, changed)
            for state in ("warm", "cold"):
                found[f"{label}, {state}"] = _case(first, second, cold=state == "cold")
    return {"cases": found, "worst_ratio": max(row["ratio"] for row in found.values())}


def _case(first: Path, second: Path, *, cold: bool) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"read": [], "compare": []}
    if not cold:
        apart("read", first, second)
    for _ in range(ROUNDS):
        for function, measured in rows.items():
            if cold:
                forget(first, second)
            measured.append(apart(function, first, second))
    reading, comparing = ([row["seconds"] for row in measured] for measured in rows.values())
    return {
        "gigabytes": round(rows["read"][0]["bytes"] / 1e9, 2),
        "read_seconds": [round(seconds, 2) for seconds in reading],
        "diff_seconds": [round(seconds, 2) for seconds in comparing],
        "diff": rows["compare"][-1],
        "ratio": round(statistics.median(comparing) / statistics.median(reading), 3),
    }
