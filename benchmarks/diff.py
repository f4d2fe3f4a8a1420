"""What the diff finds and what it costs.

    python -m benchmarks.diff                      all cases into benchmarks/results/diff.json
    python -m benchmarks.diff speed history        some of them

speed      10,000 operators against the same with 500 edits; seconds, memory on top of the models, entries found
history    the edits in the journals of `exact` and `prune-channels` that the diff reports as the right kind of region
onnx       a model against the ONNX file that torch exported of it: parametric operators matched
large      two files of 2.5 GB, weights included, against reading both once

Goals: speed under 5 s and 1 GB with every entry right; history at least 95 %; onnx at least 98 %; large at most 1.2.
Every case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import diff_history, diff_large, diff_onnx, diff_speed
from benchmarks.machine import commit, machine, versions

RESULTS = Path(__file__).parent / "results" / "diff.json"
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "speed": diff_speed.measure,
    "history": diff_history.measure,
    "onnx": diff_onnx.measure,
    "large": diff_large.measure,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure the named cases, or all; a partial run replaces only its own part of the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diff", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--here", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; cases are {', '.join(CASES)}")
    if options.here:
        print(json.dumps(CASES[options.here]()))
        return 0
    earlier = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    for name in options.cases or CASES:
        command = [sys.executable, "-m", "benchmarks.diff", "--here", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        earlier[name] = json.loads(done.stdout.splitlines()[-1]) | {"commit": commit()}
        print(f"{name}: {json.dumps(earlier[name], indent=1)}", file=sys.stderr)
        results = {"machine": machine(), "versions": versions("safetensors", "networkx"), "cases": earlier}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
