"""Compiled models on a GPU: built on a machine without one, checked and timed on one that needs no compiler.

    python -m benchmarks.gpu build DIR           artifacts, reference outputs and statistics; needs nvcc, no GPU
    python -m benchmarks.gpu run DIR             errors and times there, in under five minutes; needs torch, numpy and
                                                 TVM's runtime; writes benchmarks/results/gpu.json

Contestants: ours; eager PyTorch, plain, channels-last and captured as a CUDA graph; TorchInductor with CUDA graphs.
They run in turn. `latency_us` is the wall-clock time of a call that is waited for, `queued_us` the GPU's time per call
of many in a row. Errors are relative to the largest output of the same weights in float64.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results/gpu.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    halves = parser.add_subparsers(dest="half", required=True)
    building = halves.add_parser("build", help="compile everything into a folder")
    building.add_argument("folder", type=Path)
    building.add_argument("--only", nargs="*", default=[], help="parts of the names of the cases to build")
    building.add_argument("--checks", action="store_true", help="the small models of benchmarks/gpu_checks.py as well")
    running = halves.add_parser("run", help="check and time everything in a folder")
    running.add_argument("folder", type=Path)
    running.add_argument("--out", type=Path, default=RESULTS)
    running.add_argument("--seconds", type=float, default=270, help="begin nothing after so much time")
    running.add_argument("--no-inductor", action="store_true", help="do not compile the models with torch")
    running.add_argument("--kernels", action="store_true", help="add the time of every kernel of ours")
    chosen = parser.parse_args(arguments)
    if chosen.half == "build":
        return _build(chosen.folder, chosen.only, chosen.checks)
    from benchmarks.gpu_run import run

    wrong = run(chosen.folder, chosen.out, chosen.seconds, not chosen.no_inductor, chosen.kernels)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _build(folder: Path, only: list[str], checks: bool) -> int:
    from benchmarks.gpu_build import CASES, TARGET, build
    from benchmarks.gpu_verify import build_checks

    build(folder, [case for case in CASES if not only or any(part in case.name for part in only)])
    if checks:
        build_checks(folder / "checks", TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
