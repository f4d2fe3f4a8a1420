"""The tables of docs/gpu.md, from the measured numbers.

python -m benchmarks.gpu_table           write the generated part of docs/gpu.md from benchmarks/results/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["main", "page"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/gpu.json"
PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- begin: python -m benchmarks.gpu_table -->", "<!-- end -->"
SHOWN = ("ours", "eager", "eager-channels-last", "eager-graph", "inductor")


def page(results: Mapping[str, Any]) -> str:
    """The generated part: the machine, times, and errors."""
    machine, built = results["machine"], results["built"]
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, Python {machine['python']}; compiled for "
        f"{built['target']} with TVM {built['versions']['apache-tvm']}. Microseconds for a call that is waited for "
        "(in brackets: the GPU's time per call of many in a row); medians, all contestants in turn. "
        f"TensorRT: {results['tensorrt'] or 'not installed on this machine'}.",
        "",
        f"| case | {' | '.join(SHOWN)} | best other / ours |",
        f"|---|{'---|' * (len(SHOWN) + 1)}",
    ]
    lines += [_times(name, case) for name, case in results["cases"].items() if "times" in case]
    lines += ["", "| case | error | error of eager torch |", "|---|---|---|"]
    for name, case in results["cases"].items():
        lines.append(f"| {name} | {case['error']:.1e} | {case['error_eager']:.1e} |")
    checks = results.get("checks", {})
    right = sum(check["right"] for check in checks.values())
    lines += ["", f"Small models of `benchmarks/gpu_checks.py` with the right answer: {right} of {len(checks)}."]
    return "\n".join(lines)


def _times(name: str, case: Mapping[str, Any]) -> str:
    rows = {**case["times"], **{k: v for k, v in case.get("with_inductor", {}).items() if k != "ours"}}
    medians = {key: (row["latency_us"]["median"], row["queued_us"]["median"]) for key, row in rows.items()}
    cells = [f"{medians[key][0]:.0f} ({medians[key][1]:.0f})" if key in medians else "" for key in SHOWN]
    best = min((pair[0] for key, pair in medians.items() if key != "ours"), default=0.0)
    return f"| {name} | {' | '.join(cells)} | {best / medians['ours'][0]:.2f} |"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    made = page(json.loads(RESULTS.read_text(encoding="utf-8")))
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
